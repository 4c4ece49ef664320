//! What a container has left behind: the difference between what is there now and what was there when containerd
//! had just started.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use procfs::process::Process;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{self, CreateFlags, WatchFlags},
};

use crate::scope::{Scope, program_name, wait_until_gone};

/// How long processes may take to end after their container has, and containerd to remove a container's files.
const GRACE: Duration = Duration::from_secs(5);
/// One per host, and so not one container's to end.
const HOST_SERVICE: &str = "caisson-config-service";
/// The service's own files in the run directory.
const HOST_SERVICE_FILES: &str = "config.";

/// What an idle private containerd consists of.
#[derive(Debug)]
pub struct Baseline {
    scope: Scope,
    containerd: Process,
    mounts: BTreeSet<PathBuf>,
}

impl Baseline {
    /// Remembers what is there now.
    ///
    /// # Errors
    /// When containerd is not running.
    pub fn take(scope: Scope, containerd: i32) -> Result<Self> {
        let containerd = Process::new(containerd).context("look at containerd")?;
        let mounts = mounts(&containerd)?;
        Ok(Self { scope, containerd, mounts })
    }

    /// The process that containerd is from now on.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn follow(&mut self, containerd: i32) -> Result<()> {
        self.containerd = Process::new(containerd).context("look at containerd")?;
        Ok(())
    }

    /// One line for each thing that has been left, after processes and files had their time to go.
    ///
    /// # Errors
    /// When the machine's state cannot be read.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let deadline = Instant::now() + GRACE;
        self.wait_for_processes(deadline)?;
        self.wait_for_files(deadline)?;
        let mut left: Vec<String> = self.extra_processes()?.iter().map(describe).collect();
        let mounts = mounts(&self.containerd)?;
        left.extend(mounts.difference(&self.mounts).map(|path| format!("mount {}", path.display())));
        left.extend(self.extra_cgroups()?.iter().map(|path| format!("cgroup {}", path.display())));
        left.extend(self.extra_files()?.iter().map(|path| format!("file {}", path.display())));
        left.extend(self.loop_devices().iter().map(|path| format!("loop device {}", path.display())));
        Ok(left)
    }

    fn wait_for_processes(&self, deadline: Instant) -> Result<()> {
        loop {
            let processes = self.extra_processes()?;
            for process in &processes {
                if !wait_until_gone(process, deadline)? {
                    return Ok(());
                }
            }
            if processes.is_empty() {
                return Ok(());
            }
        }
    }

    fn wait_for_files(&self, deadline: Instant) -> Result<()> {
        loop {
            let removals = inotify::init(CreateFlags::CLOEXEC).context("watch directories")?;
            for dir in self.extra_files()?.iter().filter_map(|file| file.parent()) {
                // A directory that is gone needs no watch.
                let _ = inotify::add_watch(&removals, dir, WatchFlags::DELETE | WatchFlags::MOVED_FROM);
            }
            // What went before it was watched makes no event.
            if self.extra_files()?.is_empty() {
                return Ok(());
            }
            let limit = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
            let mut watched = [PollFd::new(&removals, PollFlags::IN)];
            if rustix::io::retry_on_intr(|| poll(&mut watched, Some(&limit))).context("wait for removals")? == 0 {
                return Ok(());
            }
        }
    }

    fn extra_processes(&self) -> Result<Vec<Process>> {
        let mut processes = self.scope.processes()?;
        processes.retain(|process| process.pid != self.containerd.pid && program_name(process) != HOST_SERVICE);
        Ok(processes)
    }

    /// runc leaves the directory of the namespace; so may we.
    fn extra_cgroups(&self) -> Result<Vec<PathBuf>> {
        let name = self.scope.name();
        let mut cgroups = self.scope.cgroups()?;
        cgroups.retain(|path| path.file_name().is_some_and(|last| *last != *name));
        Ok(cgroups)
    }

    /// Files, sockets and directories where nothing stays when no container runs.
    fn extra_files(&self) -> Result<Vec<PathBuf>> {
        let run_dir = self.scope.run_dir();
        let namespace = self.scope.name();
        let tasks = Path::new("io.containerd.runtime.v2.task").join(&namespace);
        // In containerd's mount namespace: shims' sockets, runc's states.
        let private_run = PathBuf::from(format!("/proc/{}/root/run/containerd", self.containerd.pid));

        let mut found = children(&run_dir);
        found.retain(|path| !file_name(path).starts_with(HOST_SERVICE_FILES) && !is_empty_dir(path));
        for dir in ["state", "root"] {
            found.extend(children(&self.scope.dir().join(dir).join(&tasks)));
        }
        // `fifo` is left out: those are ctr's own, which it forgets when a shim dies.
        for dir in ["s", &format!("runc/{namespace}")] {
            found.extend(children(&private_run.join(dir)));
        }
        Ok(found)
    }

    fn loop_devices(&self) -> Vec<PathBuf> {
        let backs = |device: &PathBuf| {
            let file = fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default();
            Path::new(&file).starts_with(self.scope.dir())
        };
        children(Path::new("/sys/block")).into_iter().filter(backs).collect()
    }
}

fn mounts(process: &Process) -> Result<BTreeSet<PathBuf>> {
    let mounts = process.mountinfo().context("read containerd's mounts")?;
    Ok(mounts.into_iter().map(|mount| mount.mount_point).collect())
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

fn is_empty_dir(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn describe(process: &Process) -> String {
    format!("process {} {}", process.pid, process.cmdline().unwrap_or_default().join(" "))
}
