//! What belongs to one private containerd: everything can be told by the name of its directory, also by a later process
//! that finds the directory without its owner.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use procfs::process::Process;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// Short, because the path of a Unix socket has 107 bytes and containerd's are long.
const PARENT: &str = "/tmp";
const PREFIX: &str = "caisson-";
const CGROUPS: &str = "/sys/fs/cgroup";

/// The directory of one private containerd, and with it the extent of everything that it started.
#[derive(Clone, Debug)]
pub struct Scope {
    dir: PathBuf,
}

impl Scope {
    /// A new one, after those that others have abandoned are gone.
    ///
    /// # Errors
    /// As for [`Self::sweep_abandoned`] and [`Self::create`].
    pub(crate) fn prepared() -> Result<Self> {
        Self::sweep_abandoned()?;
        Self::create()
    }

    /// Makes a directory and marks it as this process's.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(PARENT).context("make a directory in /tmp")?;
        let scope = Self { dir: dir.keep() };
        fs::create_dir(scope.run_dir()).context("make the run directory")?;
        scope.mark(&this_process()?)?;
        Ok(scope)
    }

    /// Says whose the directory is, all at once: who sweeps meanwhile never reads half of it.
    fn mark(&self, owner: &str) -> Result<()> {
        let unfinished = self.dir.join("owner.new");
        fs::write(&unfinished, owner)
            .and_then(|()| fs::rename(&unfinished, self.owner()))
            .with_context(|| format!("mark the owner of {}", self.dir.display()))
    }

    /// Ends what processes that were killed have left behind.
    ///
    /// # Errors
    /// When /tmp cannot be read or a process cannot be ended.
    pub fn sweep_abandoned() -> Result<()> {
        Self::sweep(|owner| !is_alive(owner))
    }

    /// Ends everything that this process has started, for when it is interrupted.
    ///
    /// # Errors
    /// As for [`Self::sweep_abandoned`].
    pub fn sweep_own() -> Result<()> {
        let this = this_process()?;
        Self::sweep(|owner| owner == this)
    }

    fn sweep(is_due: impl Fn(&str) -> bool) -> Result<()> {
        for entry in fs::read_dir(PARENT).context("read /tmp")?.flatten() {
            let scope = Self { dir: entry.path() };
            let Ok(owner) = fs::read_to_string(scope.owner()) else { continue };
            if entry.file_name().to_string_lossy().starts_with(PREFIX) && is_due(&owner) {
                scope.clear()?;
            }
        }
        Ok(())
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `CAISSON_RUN_DIR` of everything in here.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The directory's name: also containerd's namespace, and so part of every cgroup's path.
    pub fn name(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Every process that was started in here, but not this one.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let this = std::process::id().cast_signed();
        let all = procfs::process::all_processes().context("read /proc")?;
        Ok(all.flatten().filter(|process| process.pid != this && self.started(process)).collect())
    }

    /// The processes that run the program `name`.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn processes_named(&self, name: &str) -> Result<Vec<Process>> {
        let mut processes = self.processes()?;
        processes.retain(|process| program_name(process) == name);
        Ok(processes)
    }

    /// Every control group that was made in here.
    ///
    /// # Errors
    /// When the control groups cannot be read.
    pub fn cgroups(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        collect_below(Path::new(CGROUPS), &mut found).context("read /sys/fs/cgroup")?;
        let name = self.name();
        found.retain(|path| path.to_string_lossy().contains(&name));
        Ok(found)
    }

    /// Ends all processes, takes away the control groups and the directory. Mounts go with the processes' namespace.
    ///
    /// # Errors
    /// When a process outlives SIGKILL or the directory cannot be removed.
    pub fn clear(&self) -> Result<()> {
        // A process may start another one before it is killed; the second round finds that.
        for _ in 0..16 {
            let processes = self.processes()?;
            if processes.is_empty() {
                break;
            }
            for process in &processes {
                kill(process, Duration::from_secs(5))?;
            }
        }
        let mut cgroups = self.cgroups()?;
        cgroups.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
        for cgroup in cgroups {
            fs::remove_dir(&cgroup).or_else(ignore_missing).with_context(|| format!("remove {}", cgroup.display()))?;
        }
        fs::remove_dir_all(&self.dir).or_else(ignore_missing).with_context(|| format!("remove {}", self.dir.display()))
    }

    fn owner(&self) -> PathBuf {
        self.dir.join("owner")
    }

    /// By its environment, its arguments or its control group: a daemon keeps the first, a hypervisor has our paths in
    /// the second, a container's process has only the third. A process that has ended is none, also while its
    /// parent has not collected it.
    fn started(&self, process: &Process) -> bool {
        if process.stat().map_or(true, |stat| matches!(stat.state, 'Z' | 'X')) {
            return false;
        }
        let in_environment = || {
            let environment = process.environ().unwrap_or_default();
            environment.values().any(|value| Path::new(value).starts_with(&self.dir))
        };
        let in_arguments = || {
            let dir = format!("{}/", self.dir.display());
            process.cmdline().unwrap_or_default().iter().any(|argument| argument.contains(&dir))
        };
        let in_cgroup = || {
            let name = self.name();
            process.cgroups().is_ok_and(|groups| groups.into_iter().any(|group| group.pathname.contains(&name)))
        };
        in_environment() || in_arguments() || in_cgroup()
    }
}

/// Waits until `process` has ended; false when `deadline` passes first.
///
/// # Errors
/// When the process cannot be watched.
pub(crate) fn wait_until_gone(process: &Process, deadline: Instant) -> Result<bool> {
    let Some(pid) = Pid::from_raw(process.pid) else { return Ok(true) };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(true) };
    let limit = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
    let mut watched = [PollFd::new(&pidfd, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut watched, Some(&limit))).context("wait for a process")?;
    Ok(ready > 0)
}

/// The executable's file name; a process's own idea of its name is cut after 15 bytes.
pub fn program_name(process: &Process) -> String {
    let program = process.exe().unwrap_or_default();
    program.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Sends SIGKILL and waits for the end.
///
/// # Errors
/// When the process is still there after `limit`.
pub fn kill(process: &Process, limit: Duration) -> Result<()> {
    let Some(pid) = Pid::from_raw(process.pid) else { return Ok(()) };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    // The only error is that it has ended already.
    let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    let ended = wait_until_gone(process, Instant::now() + limit)?;
    anyhow::ensure!(ended, "process {} is still there {limit:?} after SIGKILL", process.pid);
    Ok(())
}

/// Process id and start time: together unique.
fn this_process() -> Result<String> {
    let stat = Process::myself().and_then(|process| process.stat()).context("read /proc/self/stat")?;
    Ok(format!("{} {}", stat.pid, stat.starttime))
}

fn is_alive(owner: &str) -> bool {
    let Some((pid, start)) = owner.split_once(' ') else { return false };
    let stat = pid.parse().ok().and_then(|pid| Process::new(pid).ok()).and_then(|process| process.stat().ok());
    stat.is_some_and(|stat| stat.starttime.to_string() == start)
}

/// All directories below `dir`. One that goes away meanwhile is none.
fn collect_below(dir: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = collect_below(&entry.path(), found);
            found.push(entry.path());
        }
    }
    Ok(())
}

fn ignore_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_with_the_run_directory_in_its_environment_is_found_and_ended() {
        let scope = Scope::create().unwrap();
        let mut child = Command::new("sleep").arg("60").env("CAISSON_RUN_DIR", scope.run_dir()).spawn().unwrap();
        let found: Vec<u32> = scope.processes().unwrap().iter().map(|process| process.pid.cast_unsigned()).collect();
        assert_eq!(found, [child.id()]);
        scope.clear().unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!scope.dir().exists());
    }

    #[test]
    fn a_directory_whose_owner_has_ended_is_swept() {
        let scope = Scope::create().unwrap();
        let mut child = Command::new("sleep").arg("60").env("CAISSON_RUN_DIR", scope.run_dir()).spawn().unwrap();
        // From here on, other tests' containerds sweep it too.
        scope.mark(&format!("{} 1", std::process::id())).unwrap();
        Scope::sweep_abandoned().unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!scope.dir().exists());
    }

    #[test]
    fn this_process_is_alive_and_one_with_another_start_time_is_not() {
        assert!(is_alive(&this_process().unwrap()));
        assert!(!is_alive(&format!("{} 1", std::process::id())));
    }
}
