//! Tells when something of the host may have changed, by `inotify(7)`.

use std::{io, mem::MaybeUninit, os::fd::OwnedFd, path::Path, sync::Arc};

use caisson_protocol::sys::register;
use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::{Errno, read},
};
use tokio::{io::unix::AsyncFd, sync::watch};

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

/// Watches paths; cheap to clone, and every clone is told of what changes. One is enough for a sandbox: the sysctl
/// `fs.inotify.max_user_instances` lets root have 128 of them.
#[derive(Clone, Debug)]
pub struct Watch {
    events: Arc<AsyncFd<OwnedFd>>,
    changes: watch::Receiver<()>,
}

impl Watch {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Self> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let events = Arc::new(register(events).map_err(|(_, error)| error)?);
        let (sender, changes) = watch::channel(());
        tokio::spawn(tell(events.clone(), sender));
        Ok(Self { events, changes })
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
        inotify::add_watch(self.events.get_ref(), path, changes | WatchFlags::MASK_ADD).map(drop).map_err(|error| {
            match error {
                Errno::NOSPC => {
                    io::Error::other("too many files are watched; raise the sysctl fs.inotify.max_user_watches")
                }
                other => other.into(),
            }
        })
    }

    /// Waits until something has changed since the last call.
    pub async fn changed(&mut self) -> io::Result<()> {
        self.changes.changed().await.map_err(io::Error::other)
    }
}

/// Tells of changes as long as somebody listens.
async fn tell(events: Arc<AsyncFd<OwnedFd>>, changes: watch::Sender<()>) {
    loop {
        tokio::select! {
            () = changes.closed() => return,
            read = read_all(&events) => match read {
                Ok(()) => changes.send_replace(()),
                // Those who listen learn that there is no more to come.
                Err(_) => return,
            }
        }
    }
}

/// Waits for events, and takes all that are there.
async fn read_all(events: &AsyncFd<OwnedFd>) -> io::Result<()> {
    events.readable().await?.clear_ready();
    let mut buffer = [MaybeUninit::<u8>::uninit(); BUFFER];
    loop {
        match read(events.get_ref(), &mut buffer) {
            Ok(_) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, time::Duration};

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn everybody_who_watches_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Watch::new().unwrap();
        let mut second = first.clone();
        first.add(dir.path()).unwrap();
        fs::write(dir.path().join("new"), "").unwrap();
        tokio::time::timeout(LIMIT, first.changed()).await.unwrap().unwrap();
        tokio::time::timeout(LIMIT, second.changed()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_watches_no_more_holds_no_descriptor() {
        let watch = Watch::new().unwrap();
        let events = Arc::downgrade(&watch.events);
        drop(watch);
        tokio::task::yield_now().await;
        assert!(events.upgrade().is_none());
    }
}
