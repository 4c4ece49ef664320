//! A child process of the launcher: a hypervisor or a device backend. Its end is an event, its last words are kept, and
//! it never outlives the launcher.

use std::{
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use command_fds::CommandFdExt;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    sync::{mpsc, watch},
    time::timeout,
};

use crate::{Error, Result, sys, tail::Tail};

/// A running child; killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    program: PathBuf,
    pid: u32,
    kill: mpsc::Sender<()>,
    ended: watch::Receiver<Option<Ended>>,
}

/// How a child ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// What the kernel says.
    pub status: ExitStatus,
    /// The end of what the child wrote to its standard error.
    pub stderr: String,
}

/// A child's standard input and output; its standard error is for its last words.
#[derive(Debug)]
pub struct Streams {
    /// What it reads.
    pub stdin: Stdio,
    /// Where it writes.
    pub stdout: Stdio,
}

impl Process {
    /// Starts `program` with `arguments`; `descriptors` keep their numbers in the child. Must be called on the thread that
    /// lives as long as the launcher.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn start(program: &Path, arguments: &[String], descriptors: Vec<OwnedFd>) -> Result<Self> {
        let streams = Streams { stdin: Stdio::null(), stdout: Stdio::null() };
        Self::start_with(program, arguments, descriptors, streams)
    }

    /// [`Self::start`] for a program that uses its standard streams.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn start_with(
        program: &Path,
        arguments: &[String],
        descriptors: Vec<OwnedFd>,
        streams: Streams,
    ) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments).preserved_fds(descriptors).kill_on_drop(true);
        command.stdin(streams.stdin).stdout(streams.stdout).stderr(Stdio::piped());
        sys::die_with_parent(&mut command);
        let mut child = command.spawn().map_err(Error::host(format!("execute {}", program.display())))?;
        let pid = child.id().unwrap_or_default();
        let stderr = Arc::new(Mutex::new(Tail::default()));
        let reader = child.stderr.take().map(|pipe| tokio::spawn(keep_tail(pipe, stderr.clone())));
        let (kill, mut killed) = mpsc::channel(1);
        let (tell, ended) = watch::channel(None);
        tokio::spawn(async move {
            let status = wait(&mut child, &mut killed).await;
            if let Some(reader) = reader {
                // The pipe ends with its last writer, and a child's own children do not matter here.
                let _ = timeout(LAST_WORDS, reader).await;
            }
            let stderr = stderr.lock().expect("no reader panics").text();
            tell.send_replace(Some(Ended { status, stderr }));
        });
        Ok(Self { program: program.to_owned(), pid, kill, ended })
    }

    /// The same child, called by the name of the program that it executes next.
    pub(crate) fn becomes(self, program: &Path) -> Self {
        Self { program: program.to_owned(), ..self }
    }

    /// On the host.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends the child at once; [`Self::ended`] tells when it has.
    pub fn kill(&self) {
        // Full: it is being killed already. Closed: it has ended.
        let _ = self.kill.try_send(());
    }

    /// Answers when the child has ended and was reaped.
    pub async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(ended) => ended.clone().expect("waited for"),
            Err(_) => unreachable!("the task that reaps a child always tells"),
        }
    }

    /// `ended` in words for people: "/usr/bin/qemu-system-x86_64 exited with status 1: its last words".
    pub fn describe(&self, ended: &Ended) -> String {
        let how = match (ended.status.code(), ended.status.signal()) {
            (Some(code), _) => format!("exited with status {code}"),
            (None, Some(signal)) => format!("was killed by {}", signal_name(signal)),
            (None, None) => "ended".to_owned(),
        };
        let words = if ended.stderr.is_empty() { String::new() } else { format!(": {}", ended.stderr) };
        format!("{} (pid {}) {how}{words}", self.program.display(), self.pid)
    }
}

/// How long the last words of an ended child may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(200);

fn signal_name(number: i32) -> String {
    nix::sys::signal::Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |signal| signal.to_string())
}

async fn wait(child: &mut Child, killed: &mut mpsc::Receiver<()>) -> ExitStatus {
    tokio::select! {
        status = child.wait() => return status.unwrap_or_default(),
        // A message, or the `Process` was dropped.
        _ = killed.recv() => {}
    }
    // It fails when the child has ended, which is all the same.
    let _ = child.start_kill();
    child.wait().await.unwrap_or_default()
}

async fn keep_tail(mut pipe: impl AsyncRead + Unpin, tail: Arc<Mutex<Tail>>) {
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        tail.lock().expect("no reader panics").push(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        Process::start(Path::new("/bin/sh"), &["-c".into(), script.into()], Vec::new()).unwrap()
    }

    #[tokio::test]
    async fn last_words_and_status_are_told() {
        let process = shell("echo no disk >&2; exit 3");
        let ended = process.ended().await;
        assert_eq!(process.describe(&ended), format!("/bin/sh (pid {}) exited with status 3: no disk", process.pid()));
    }

    #[tokio::test]
    async fn a_kill_is_told_by_its_signal() {
        let process = shell("exec sleep 1000");
        process.kill();
        let ended = process.ended().await;
        assert!(process.describe(&ended).ends_with("was killed by SIGKILL"));
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed_and_reaped() {
        let process = shell("exec sleep 1000");
        let mut ended = process.ended.clone();
        drop(process);
        assert_eq!(ended.wait_for(Option::is_some).await.unwrap().as_ref().unwrap().status.signal(), Some(9));
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = Process::start(Path::new("/nonexistent/qemu"), &[], Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "execute /nonexistent/qemu");
    }
}
