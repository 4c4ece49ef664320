//! Tells when files may have changed, without looking at them again and again.

use std::{
    collections::BTreeSet,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;

use crate::sys;

/// The kernel's reports about the folders that hold some files.
#[derive(Debug)]
pub(crate) struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    /// Of `files`, which need not exist, from now on.
    ///
    /// # Errors
    /// When the kernel's limits are reached, `inotify(7)`.
    pub(crate) fn of(files: &[PathBuf]) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let events = WatchFlags::ATTRIB
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF;
        for dir in files.iter().flat_map(|file| dirs(file)).collect::<BTreeSet<_>>() {
            match inotify::add_watch(&inotify, &dir, events | WatchFlags::ONLYDIR) {
                // It went meanwhile: its parent's watch, or the next look, tells.
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self(sys::register(inotify)?))
    }

    /// Returns when something may have changed since the last time.
    ///
    /// # Errors
    /// When the kernel reports nothing any more.
    pub(crate) async fn next(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(self.0.get_ref(), &mut buffer) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}

/// The folders in which a change of `file` shows: its own or the nearest that exists, and that of what it links to.
fn dirs(file: &Path) -> Vec<PathBuf> {
    let own = file.ancestors().skip(1).find(|dir| dir.is_dir()).map(Path::to_owned);
    let target = file.canonicalize().ok().and_then(|target| target.parent().map(Path::to_owned));
    // A folder of drop-ins changes by itself.
    let itself = file.is_dir().then(|| file.to_owned());
    [own, target, itself].into_iter().flatten().collect()
}
