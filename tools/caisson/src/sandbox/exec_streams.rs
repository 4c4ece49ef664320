//! The standard streams of [`super::exec`]: fifos that the shim reads and writes, and threads that join them to ours.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    thread,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use tempfile::TempDir;
use tokio::{
    sync::oneshot,
    task::{JoinHandle, spawn_blocking},
};

use super::json_lines::JsonLines;
use crate::output::Format;

/// One fifo for each stream, in a directory for root only that goes with this.
pub(super) struct Fifos {
    dir: TempDir,
    /// With a terminal, standard error is part of standard output.
    terminal: bool,
}

impl Fifos {
    /// Makes them below `dir`.
    pub(super) fn make(dir: &Path, terminal: bool) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("exec-").tempdir_in(dir)?;
        for name in ["stdin", "stdout", "stderr"] {
            mkfifo(&dir.path().join(name), Mode::S_IRUSR | Mode::S_IWUSR)?;
        }
        Ok(Self { dir, terminal })
    }

    pub(super) fn stdin(&self) -> String {
        self.path("stdin")
    }

    pub(super) fn stdout(&self) -> String {
        self.path("stdout")
    }

    /// Empty with a terminal.
    pub(super) fn stderr(&self) -> String {
        if self.terminal { String::new() } else { self.path("stderr") }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Joins them to this program's streams; as JSON, both outputs come on standard output. Waits for whoever has the
    /// other ends.
    pub(super) fn open(&self, format: Format) -> io::Result<Flow> {
        let mut stdin = OpenOptions::new().write(true).open(self.stdin())?;
        let (end_input, input_end) = oneshot::channel();
        // A read from a terminal cannot be interrupted: nobody waits for this thread.
        thread::spawn(move || {
            // The program may end without reading all of its input.
            let _ = io::copy(&mut io::stdin().lock(), &mut stdin);
            drop(stdin);
            let _ = end_input.send(());
        });
        let stdout = File::open(self.stdout())?;
        let mut outputs = vec![spawn_blocking(move || match format {
            Format::Text => pass_on(stdout, io::stdout()),
            Format::Json => pass_on(stdout, JsonLines::of_stream("stdout", io::stdout())),
        })];
        if !self.terminal {
            let stderr = File::open(self.stderr())?;
            outputs.push(spawn_blocking(move || match format {
                Format::Text => pass_on(stderr, io::stderr()),
                Format::Json => pass_on(stderr, JsonLines::of_stream("stderr", io::stdout())),
            }));
        }
        Ok(Flow { input_end: Some(input_end), outputs })
    }
}

/// Bytes on their way.
pub(super) struct Flow {
    input_end: Option<oneshot::Receiver<()>>,
    outputs: Vec<JoinHandle<io::Result<()>>>,
}

impl Flow {
    /// Answers once, when our standard input has ended.
    pub(super) async fn input_ends(&mut self) {
        match &mut self.input_end {
            Some(end) => {
                let _ = end.await;
                self.input_end = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Waits until everything that the program said has been passed on.
    pub(super) async fn finish(self) -> io::Result<()> {
        for output in self.outputs {
            output.await??;
        }
        Ok(())
    }
}

/// At once, not line by line: a prompt has no end of line.
fn pass_on(mut from: File, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match io::Read::read(&mut from, &mut buffer)? {
            0 => return Ok(()),
            count => {
                to.write_all(&buffer[..count])?;
                to.flush()?;
            }
        }
    }
}
