//! Waits for a file that another process makes: some hypervisors take no listening socket, they make their own.

use std::{io, mem::MaybeUninit, os::fd::AsFd, path::Path};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init},
    io::retry_on_intr,
    process::{Pid, PidfdFlags, pidfd_open},
};

/// Answers when `path` exists, or when process `pid` has ended; whether it exists. Blocks its thread.
///
/// # Errors
/// When the kernel cannot tell of either.
pub fn until_exists(path: &Path, pid: u32) -> io::Result<bool> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let watch = init(CreateFlags::CLOEXEC)?;
    // Before the first look: nothing is missed in between.
    add_watch(&watch, directory, WatchFlags::CREATE | WatchFlags::ONLYDIR)?;
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    let process = match pidfd_open(process, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(path.exists()),
        process => process?,
    };
    let mut events = [MaybeUninit::uninit(); 4096];
    while !path.exists() {
        let mut ready = [PollFd::new(&watch, PollFlags::IN), PollFd::new(&process, PollFlags::IN)];
        // The end of another child interrupts it.
        retry_on_intr(|| poll(&mut ready, None))?;
        if !ready[1].revents().is_empty() {
            return Ok(false);
        }
        Reader::new(watch.as_fd(), &mut events).next()?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    #[test]
    fn a_file_that_comes_later_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (waited, pid) = (path.clone(), std::process::id());
        let wait = std::thread::spawn(move || until_exists(&waited, pid));
        fs::write(dir.path().join("other"), "").unwrap();
        fs::write(&path, "").unwrap();
        assert!(wait.join().unwrap().unwrap());
    }

    #[test]
    fn a_process_that_ends_first_ends_the_wait() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("/bin/true").spawn().unwrap();
        assert!(!until_exists(&dir.path().join("socket"), child.id()).unwrap());
        child.wait().unwrap();
    }
}
