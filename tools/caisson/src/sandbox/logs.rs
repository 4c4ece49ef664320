//! `caisson sandbox logs`: a guest's console, as its launcher keeps it in `console.log` and, once that was full,
//! `console.log.1`.

use std::{
    fs::File,
    io::{self, IsTerminal, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

use anyhow::Context;
use caisson_protocol::paths;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use super::{found, json_lines::JsonLines};
use crate::{output::Format, terminal::Harmless};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  caisson sandbox logs web
  caisson sandbox logs -f web | grep -i oom")]
pub(crate) struct Arguments {
    /// The sandbox's id, or the beginning of it.
    sandbox: String,
    /// Go on until the sandbox ends.
    #[arg(short, long)]
    follow: bool,
}

pub(super) fn run(arguments: &Arguments, format: Format) -> anyhow::Result<()> {
    let dir = found::find(&paths::sandboxes_dir(), &arguments.sandbox)?.dir;
    let stdout = io::stdout().lock();
    let mut out: Box<dyn Write> = match format {
        Format::Json => Box::new(JsonLines::new(stdout)),
        Format::Text if stdout.is_terminal() => Box::new(Harmless::new(stdout)),
        Format::Text => Box::new(stdout),
    };
    let done = if arguments.follow { follow(&dir, &mut out) } else { print(&dir, &mut out).map(drop) };
    done.with_context(|| format!("read the console log in {}", dir.display()))
}

/// Writes what there is, and returns the file that grows, once there is one.
fn print(dir: &Path, out: &mut impl Write) -> io::Result<Option<File>> {
    // In this order: a file that moves on between the two is seen twice rather than never.
    let mut newer = open(&dir.join("console.log"))?;
    let older = open(&dir.join("console.log.1"))?;
    if let Some(mut older) = older
        && !is_same(&older, newer.as_ref())?
    {
        io::copy(&mut older, out)?;
    }
    if let Some(newer) = &mut newer {
        io::copy(newer, out)?;
    }
    out.flush()?;
    Ok(newer)
}

/// Writes what there is and what comes, until the sandbox's directory goes.
fn follow(dir: &Path, out: &mut impl Write) -> io::Result<()> {
    // Before the first look, so that nothing happens unseen in between.
    let mut changes = Changes::of(dir)?;
    let mut file = print(dir, out)?;
    while changes.wait()? {
        if let Some(file) = &mut file {
            io::copy(file, out)?;
        }
        let newest = open(&dir.join("console.log"))?;
        if let Some(mut newest) = newest
            && !is_same(&newest, file.as_ref())?
        {
            io::copy(&mut newest, out)?;
            file = Some(newest);
        }
        out.flush()?;
    }
    if let Some(file) = &mut file {
        io::copy(file, out)?;
    }
    out.flush()
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_same(file: &File, other: Option<&File>) -> io::Result<bool> {
    let Some(other) = other else { return Ok(false) };
    let (file, other) = (file.metadata()?, other.metadata()?);
    Ok((file.dev(), file.ino()) == (other.dev(), other.ino()))
}

/// What happens to the files of a directory.
struct Changes(OwnedFd);

impl Changes {
    fn of(dir: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC)?;
        let flags = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::DELETE_SELF;
        inotify::add_watch(&inotify, dir, flags | WatchFlags::ONLYDIR)?;
        Ok(Self(inotify))
    }

    /// Returns when the console log has changed; `false` when it has gone with its directory.
    fn wait(&mut self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(self.0.as_fd(), &mut buffer);
        let mut concerned = false;
        loop {
            let event = match events.next() {
                Ok(event) => event,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if event.events().intersects(ReadFlags::DELETE_SELF | ReadFlags::IGNORED) {
                return Ok(false);
            }
            let is_log = event.file_name().is_some_and(|name| name.to_bytes() == b"console.log");
            // The directory itself ends later, when we close the log.
            if is_log && event.events().contains(ReadFlags::DELETE) {
                return Ok(false);
            }
            concerned |= is_log || event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            if concerned && events.is_buffer_empty() {
                return Ok(true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, thread};

    use super::*;

    /// Hands on what it is given.
    struct Sender(mpsc::Sender<Vec<u8>>);

    impl Write for Sender {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn printed(dir: &Path) -> String {
        let mut out = Vec::new();
        print(dir, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_older_half_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("console.log.1"), "old ").unwrap();
        fs::write(dir.path().join("console.log"), "new").unwrap();
        assert_eq!(printed(dir.path()), "old new");
    }

    #[test]
    fn a_sandbox_that_wrote_nothing_prints_nothing() {
        assert_eq!(printed(tempfile::tempdir().unwrap().path()), "");
    }

    #[test]
    fn following_sees_the_first_byte_a_new_file_and_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (log, path) = (dir.path().join("console.log"), dir.path().to_owned());
        let (sender, heard) = mpsc::channel();
        let mut hear = {
            let mut text = String::new();
            move |end: &str| {
                while !text.ends_with(end) {
                    text.push_str(&String::from_utf8(heard.recv().unwrap()).unwrap());
                }
                text.clone()
            }
        };
        fs::write(&log, "one ").unwrap();
        let follower = thread::spawn(move || follow(&path, &mut Sender(sender)));
        assert_eq!(hear("one "), "one ");
        fs::OpenOptions::new().append(true).open(&log).unwrap().write_all(b"two ").unwrap();
        assert_eq!(hear("two "), "one two ");
        fs::rename(&log, dir.path().join("console.log.1")).unwrap();
        fs::write(&log, "three").unwrap();
        assert_eq!(hear("three"), "one two three");
        dir.close().unwrap();
        follower.join().unwrap().unwrap();
    }
}
