//! The guest's cgroup tree: `agent` for this process, `containers/<id>` for each container. Version 2 only.
//!
//! The `cgroupsPath` that a container comes with names a place in the host's tree, so it is not followed.

use std::{
    fs, io,
    io::{Read, Seek},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{errno::Errno, libc::SIGKILL, unistd::Pid};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::{
    error::{Attempt, Error, Result},
    sys,
};

/// Where the tree is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
const CONTAINERS: &str = "/sys/fs/cgroup/containers";
/// How long the kernel may take to freeze a cgroup or to end its processes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Hands every controller down to the containers, and moves this process out of their way.
///
/// # Errors
/// When the kernel has no cgroup v2.
pub fn prepare() -> Result<()> {
    let agent = Path::new(ROOT).join("agent");
    for directory in [&agent, Path::new(CONTAINERS)] {
        fs::create_dir_all(directory).attempt(format_args!("make cgroup {}", directory.display()))?;
    }
    write(&agent.join("cgroup.procs"), "0")?;
    for directory in [ROOT, CONTAINERS] {
        let directory = Path::new(directory);
        for controller in read(&directory.join("cgroup.controllers"))?.split_ascii_whitespace() {
            write(&directory.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
    }
    Ok(())
}

/// Ends every process of every container.
pub fn kill_all() {
    // Nothing can be done about a refusal: the VM is about to end.
    let _ = fs::write(Path::new(CONTAINERS).join("cgroup.kill"), "1");
}

/// One container's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes an empty cgroup for container `id`.
    ///
    /// # Errors
    /// When there is one already.
    pub fn create(id: &str) -> Result<Self> {
        let path = Path::new(CONTAINERS).join(id);
        fs::create_dir(&path).attempt(format_args!("make cgroup {}", path.display()))?;
        Ok(Self(path))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// As seen from the root of the tree.
    pub fn name(&self) -> &Path {
        self.0.strip_prefix(ROOT).unwrap_or(&self.0)
    }

    /// One of its files, whole.
    ///
    /// # Errors
    /// When the kernel lacks that controller.
    pub fn read(&self, file: &str) -> Result<String> {
        read(&self.0.join(file))
    }

    /// Sets one of its files.
    ///
    /// # Errors
    /// When the kernel lacks that controller or refuses the value.
    pub fn write(&self, file: &str, value: &str) -> Result<()> {
        write(&self.0.join(file), value)
    }

    /// Every process in it and in the cgroups that the container made below.
    pub fn pids(&self) -> Vec<Pid> {
        let mut pids = Vec::new();
        let mut directories = vec![self.0.clone()];
        while let Some(directory) = directories.pop() {
            let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(listed.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
            directories.extend(children(&directory));
        }
        pids
    }

    /// Sends `signal` to every process.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self, signal: i32) -> Result<()> {
        if signal == SIGKILL {
            return self.write("cgroup.kill", "1");
        }
        for pid in self.pids() {
            match sys::kill(pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error).attempt(format_args!("send signal {signal} to process {pid}")),
            }
        }
        Ok(())
    }

    /// Stops or continues all processes, and waits until they are.
    ///
    /// # Errors
    /// When they take too long.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        self.until("frozen", value).await
    }

    /// Ends all processes and removes the cgroup and those below it.
    ///
    /// # Errors
    /// When a process cannot be ended.
    pub async fn remove(&self) -> Result<()> {
        if !self.0.exists() {
            return Ok(());
        }
        self.write("cgroup.kill", "1")?;
        self.until("populated", "0").await?;
        remove_tree(&self.0).attempt(format_args!("remove cgroup {}", self.0.display()))
    }

    /// Watches one of its event files: the kernel tells when it changes.
    ///
    /// # Errors
    /// When the kernel lacks that controller.
    pub fn watch(&self, file: &str) -> Result<Watch> {
        let path = self.0.join(file);
        let file = fs::File::open(&path).attempt(format_args!("watch {}", path.display()))?;
        let notices = file.try_clone().and_then(|file| sys::register(file, Interest::PRIORITY));
        Ok(Watch { file, notices: notices.attempt(format_args!("watch {}", path.display()))? })
    }

    async fn until(&self, key: &str, value: &str) -> Result<()> {
        let mut events = self.watch("cgroup.events")?;
        let reached = async {
            while field(&events.read()?, key) != Some(value) {
                events.changed().await?;
            }
            Ok(())
        };
        match timeout(PATIENCE, reached).await {
            Ok(done) => done,
            Err(_) => Err(Error::TooLate(format!(
                "cgroup {} did not become {key}={value} within {PATIENCE:?}",
                self.0.display()
            ))),
        }
    }
}

/// An event file of a cgroup.
pub struct Watch {
    file: fs::File,
    notices: AsyncFd<OwnedFd>,
}

impl Watch {
    /// The file as it is now.
    ///
    /// # Errors
    /// When the cgroup has gone.
    pub fn read(&mut self) -> Result<String> {
        let mut text = String::new();
        let file = &mut self.file;
        file.rewind().and_then(|()| file.read_to_string(&mut text)).attempt("read a cgroup's events")?;
        Ok(text)
    }

    /// Waits until the file differs from what was read last.
    ///
    /// # Errors
    /// When the cgroup has gone.
    pub async fn changed(&mut self) -> Result<()> {
        let mut ready = self.notices.ready(Interest::PRIORITY).await.attempt("wait for a cgroup's events")?;
        ready.clear_ready();
        Ok(())
    }
}

/// The value of `key` in a file of `key value` lines.
pub fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().filter_map(|line| line.split_once(' ')).find(|(name, _)| *name == key).map(|(_, value)| value.trim())
}

fn children(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for child in children(directory) {
        remove_tree(&child)?;
    }
    fs::remove_dir(directory)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).attempt(format_args!("read {}", path.display()))
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).attempt(format_args!("write {value} to {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "oom 1\noom_kill 3\n";
        assert_eq!(field(text, "oom_kill"), Some("3"));
        assert_eq!(field(text, "kill"), None);
    }

    #[test]
    fn a_tree_is_removed_from_its_leaves_up() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::create_dir_all(top.join("c")).unwrap();
        remove_tree(&top).unwrap();
        assert!(!top.exists());
    }
}
