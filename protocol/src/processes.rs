//! The processes of a VM that may outlive its launcher: a list on disk, by which whoever owns the sandbox ends them when no
//! launcher does.
//!
//! Each process adds itself before it executes its program, so that there is none which is not on the list. A process is
//! named by its id and by when it began: a number that was given away names nobody.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::geteuid,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A list has a line of at most some hundred bytes for each process, and a VM has a process for each of its devices.
const MAX_LIST: u64 = 1 << 20;
/// Changes whenever the host starts, and with it what process ids mean.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Names one process for good, as long as the host runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// On the host.
    pub pid: u32,
    /// When it began, in clock ticks since the host's boot.
    pub start_ticks: u64,
}

impl ProcessId {
    /// The process that has the number `pid` now; `None` when there is none.
    pub fn of(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// A line of `proc_pid_stat(5)`.
    fn parse(stat: &str) -> Option<Self> {
        // The second field is the program's name in parentheses and may hold anything, so count from its end.
        let (start, rest) = stat.rsplit_once(')')?;
        let pid = start.split(' ').next()?.parse().ok()?;
        Some(Self { pid, start_ticks: rest.split_whitespace().nth(19)?.parse().ok()? })
    }

    /// A descriptor that stays with this process even if its number is given away; `None` when it is gone. It may have
    /// ended and wait for its parent.
    ///
    /// # Errors
    /// When the kernel gives no descriptor.
    pub fn open(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            process => process?,
        };
        // Opened first and compared then.
        Ok((Self::of(self.pid) == Some(self)).then_some(process))
    }

    /// Sends `signal`, and waits for at most `limit` until the process has ended; whether it has.
    ///
    /// # Errors
    /// When the kernel does not let this process do that.
    pub fn end(self, signal: Signal, limit: Duration) -> io::Result<bool> {
        let Some(process) = self.open()? else { return Ok(true) };
        match pidfd_send_signal(&process, signal) {
            Err(rustix::io::Errno::SRCH) => return Ok(true),
            sent => sent?,
        }
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        Ok(poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], limit)? == 1)
    }
}

/// Names this start of the host.
///
/// # Errors
/// When `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// The list of a VM's processes in a directory of its own.
#[derive(Clone, Debug)]
pub struct ProcessList(PathBuf);

impl ProcessList {
    /// In the directory `dir`.
    pub fn in_dir(dir: &Path) -> Self {
        Self(dir.join("processes"))
    }

    /// An empty list, open for each process to write its line of `/proc/self/stat` at the end.
    ///
    /// # Errors
    /// `AlreadyExists` when there is one: then there is a VM.
    pub fn create(&self) -> io::Result<File> {
        let mut file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&self.0)?;
        file.write_all(format!("{}\n", boot_id()?).as_bytes())?;
        Ok(file)
    }

    /// The list, for a further process.
    ///
    /// # Errors
    /// When there is none that can be trusted.
    pub fn open(&self) -> io::Result<File> {
        let file = OpenOptions::new().read(true).append(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&self.0)?;
        check_owner(&file)?;
        Ok(file)
    }

    /// Who is on it; nobody when the host was started since.
    ///
    /// # Errors
    /// When there is none that can be trusted.
    pub fn read(&self) -> io::Result<Vec<ProcessId>> {
        let mut text = String::new();
        self.open()?.take(MAX_LIST).read_to_string(&mut text)?;
        let mut lines = text.lines();
        if lines.next() != Some(boot_id()?.as_str()) {
            return Ok(Vec::new());
        }
        Ok(lines.filter_map(ProcessId::parse).collect())
    }

    /// Ends by force everybody on it who is still there, and removes it. Nothing happens when there is none.
    ///
    /// # Errors
    /// When it cannot be trusted, or a process does not end within `limit`; the list stays then.
    pub fn end_all(&self, limit: Duration) -> io::Result<()> {
        let processes = match self.read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            processes => processes?,
        };
        for process in processes {
            if !process.end(Signal::KILL, limit)? {
                let message = format!("process {} does not end even by SIGKILL", process.pid);
                return Err(io::Error::new(io::ErrorKind::TimedOut, message));
            }
        }
        self.remove();
        Ok(())
    }

    /// Forgets them.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// # Errors
/// When others could have written `file`: it says which processes to end, or what to connect to.
pub fn check_owner(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    let owner = geteuid().as_raw();
    if metadata.is_file() && metadata.uid() == owner && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!(
            "it is no file that only user {owner} can write (owner {}, mode {:o})",
            metadata.uid(),
            metadata.mode()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, process::Command};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn list_with(lines: &[&str]) -> (tempfile::TempDir, ProcessList) {
        let dir = tempfile::tempdir().unwrap();
        let list = ProcessList::in_dir(dir.path());
        let mut file = list.create().unwrap();
        lines.iter().for_each(|line| file.write_all(line.as_bytes()).unwrap());
        (dir, list)
    }

    fn stat(pid: u32) -> String {
        fs::read_to_string(format!("/proc/{pid}/stat")).unwrap()
    }

    #[test]
    fn a_process_on_the_list_is_ended() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let (_dir, list) = list_with(&[&stat(child.id())]);
        list.end_all(LIMIT).unwrap();
        assert!(!child.wait().unwrap().success());
        assert_eq!(list.read().unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_number_that_was_given_to_somebody_else_is_nobody() {
        let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
        let earlier = ProcessId { start_ticks: 1, ..ProcessId::of(other.id()).unwrap() };
        assert!(earlier.open().unwrap().is_none());
        assert!(earlier.end(Signal::KILL, LIMIT).unwrap());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn a_list_of_another_start_of_the_host_names_nobody() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("processes"), format!("another\n{}", stat(std::process::id()))).unwrap();
        assert_eq!(ProcessList::in_dir(dir.path()).read().unwrap(), []);
    }

    #[test]
    fn a_list_that_others_can_write_ends_nobody() {
        let (dir, list) = list_with(&[&stat(std::process::id())]);
        fs::set_permissions(dir.path().join("processes"), fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(list.end_all(LIMIT).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_name_with_parentheses_hides_nothing() {
        let line = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(ProcessId::parse(line), Some(ProcessId { pid: 7, start_ticks: 4711 }));
    }
}
