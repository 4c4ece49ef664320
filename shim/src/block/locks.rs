//! Files and directories that several processes use at once, kept apart by `flock(2)`: the kernel gives a lock back
//! however its holder ends, so that nothing is ever in use by the dead.

use std::{
    fs::{File, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
};

use tokio::sync::oneshot;

/// How a path is locked.
#[derive(Clone, Copy, Debug)]
pub enum Lock {
    /// With others who use it.
    Shared,
    /// Alone.
    Exclusive,
}

/// Locks `file`, which was opened at `path`, after others have let go of it. `None` when it is by then no longer what the
/// path names: it was renamed or removed.
pub async fn lock(file: File, path: &Path, kind: Lock) -> io::Result<Option<File>> {
    let file = wait(file, kind).await?;
    Ok(is_at(&file, path)?.then_some(file))
}

/// Locks `file`, which was opened at `path`, for the caller alone: not when somebody uses it, or it is no longer what the
/// path names.
pub fn lock_unless_used(file: &File, path: &Path) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => is_at(file, path),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

async fn wait(file: File, kind: Lock) -> io::Result<File> {
    let tried = match kind {
        Lock::Shared => file.try_lock_shared(),
        Lock::Exclusive => file.try_lock(),
    };
    match tried {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let (sender, receiver) = oneshot::channel();
    // Not one of the runtime's threads, whose end the runtime waits for: this one ends with the process.
    thread::Builder::new().stack_size(64 << 10).spawn(move || {
        let locked = match kind {
            Lock::Shared => file.lock_shared(),
            Lock::Exclusive => file.lock(),
        };
        // Nobody listens any more when the sandbox was stopped.
        let _ = sender.send(locked.map(|()| file));
    })?;
    receiver.await.unwrap_or_else(|_| Err(io::Error::other("the waiting thread ended early")))
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let (open, named) = (file.metadata()?, path.symlink_metadata());
    match named {
        Ok(named) => Ok((open.dev(), open.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
