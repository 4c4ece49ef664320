//! Tells when something of the host may have changed, by `inotify(7)`.

use std::{io, mem::MaybeUninit, os::fd::OwnedFd, path::Path, sync::Arc};

use caisson_protocol::sys::register;
use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::{Errno, read},
};
use tokio::io::unix::AsyncFd;

/// Whatever changes content, owner or mode, or what a name stands for. Not each write: the end of writing is enough.
const CHANGES: WatchFlags = WatchFlags::ATTRIB
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MOVE_SELF);
/// Something new has a name.
const NAMES: WatchFlags = WatchFlags::CREATE.union(WatchFlags::MOVED_TO);
/// Room for many events at once; what they say does not matter.
const BUFFER: usize = 4096;

/// Watches paths; cheap to clone.
#[derive(Clone, Debug)]
pub struct Watch(Arc<AsyncFd<OwnedFd>>);

impl Watch {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Self> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        register(events).map(|events| Self(Arc::new(events))).map_err(|(_, error)| error)
    }

    /// Watches the file or folder at `path` too; a second time changes nothing. Of a file also whether another one takes
    /// its name.
    pub fn add(&self, path: &Path) -> io::Result<()> {
        self.add_for(path, CHANGES)?;
        match path.parent() {
            Some(parent) if !path.is_dir() => self.add_for(parent, NAMES),
            _ => Ok(()),
        }
    }

    fn add_for(&self, path: &Path, changes: WatchFlags) -> io::Result<()> {
        inotify::add_watch(self.0.get_ref(), path, changes | WatchFlags::MASK_ADD).map(drop).map_err(
            |error| match error {
                Errno::NOSPC => {
                    io::Error::other("too many files are watched; raise the sysctl fs.inotify.max_user_watches")
                }
                other => other.into(),
            },
        )
    }

    /// Waits until something has changed since the last call.
    pub async fn changed(&self) -> io::Result<()> {
        self.0.readable().await?.clear_ready();
        let mut buffer = [MaybeUninit::<u8>::uninit(); BUFFER];
        loop {
            match read(self.0.get_ref(), &mut buffer) {
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
