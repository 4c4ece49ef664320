//! One container: what it stands on, its first process and its further ones.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_protocol::{
    containerd::api::{CreateTaskRequest, Mount},
    guest::{Event, OutOfMemory},
    paths::GUEST_BUNDLE_DIR,
};
use nix::{libc::SIGKILL, unistd::Pid};
use tokio::task::AbortHandle;
use tracing::warn;

use crate::{
    cgroup::{Cgroup, field},
    error::{Attempt, Error, Result},
    events::Events,
    launch::{Kind, Order},
    mounts,
    process::{Process, Stdio},
    reaper::Reaper,
    state::State,
};

/// Where each container has a directory for its gates.
const RUN_DIR: &str = "/run/caisson/containers";

/// One container.
pub struct Container {
    ground: Ground,
    /// Its first process.
    pub init: Arc<Process>,
    execs: Mutex<HashMap<String, Exec>>,
    oom_watch: Option<AbortHandle>,
}

/// A process that was described and perhaps started.
#[derive(Clone)]
pub struct Exec {
    /// The process.
    pub process: Arc<Process>,
    /// The OCI process, JSON.
    description: Arc<str>,
}

impl Container {
    /// Makes a container; its first process waits at its gate. Nothing is left of one that cannot be made.
    ///
    /// # Errors
    /// When its root file system, its streams or its first process cannot be had.
    pub async fn create(reaper: &Reaper, events: &Events, request: &CreateTaskRequest) -> Result<Self> {
        let ground = Ground::lay(request).await?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let init = Process::new(&ground.id, "", stdio, ground.run_dir.join("init"), State::Starting);
        let order = ground.order(&init, Kind::Init);
        // The kernel tells of memory running out only to those who looked before.
        let oom_watch = watch_memory(&ground, events);
        if let Err(error) = init.make(reaper, events, &order).await {
            if let Some(watch) = oom_watch {
                watch.abort();
            }
            ground.clear().await;
            return Err(error);
        }
        Ok(Self { ground, init, execs: Mutex::default(), oom_watch })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.ground.id
    }

    /// Its bundle's directory.
    pub fn bundle(&self) -> &Path {
        &self.ground.bundle
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.ground.cgroup
    }

    /// The first process, or the one that `exec_id` names when it is not empty.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() { Ok(self.init.clone()) } else { Ok(self.exec(exec_id)?.process) }
    }

    /// Describes one more process.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_exec(&self, exec_id: &str, stdio: Stdio, description: &str) -> Result<()> {
        if !matches!(self.init.state(), State::Running(_)) {
            return Err(self.init.state().wrong(&format!("run a further process in container {} beside", self.id())));
        }
        let mut execs = self.execs();
        if execs.contains_key(exec_id) {
            return Err(Error::AlreadyExists(format!("container {} already has a process {exec_id}", self.id())));
        }
        let gate = self.ground.run_dir.join(format!("exec-{exec_id}"));
        let process = Process::new(self.id(), exec_id, stdio, gate, State::Added);
        execs.insert(exec_id.to_owned(), Exec { process, description: description.into() });
        Ok(())
    }

    /// Makes and starts a further process.
    ///
    /// # Errors
    /// When it was started before, or cannot be made.
    pub async fn start_exec(&self, reaper: &Reaper, events: &Events, exec_id: &str) -> Result<Pid> {
        let Exec { process, description } = self.exec(exec_id)?;
        let init = match self.init.state() {
            State::Running(pid) => pid,
            other => return Err(other.wrong(&format!("run a further process in container {} beside", self.id()))),
        };
        process.change(State::begin)?;
        let kind = Kind::Exec { init: init.as_raw(), process: description.to_string() };
        let mut order = self.ground.order(&process, kind);
        order.cgroup = cgroup_of(init).unwrap_or(order.cgroup);
        if let Err(error) = process.make(reaper, events, &order).await {
            process.change(State::abandon);
            return Err(error);
        }
        process.start().await
    }

    /// Forgets a further process that ended, or never began.
    ///
    /// # Errors
    /// While it runs.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<Arc<Process>> {
        let process = self.exec(exec_id)?.process;
        match process.state() {
            State::Added | State::Exited(..) => {}
            other @ (State::Starting | State::Created(_) | State::Running(_) | State::Paused(_)) => {
                return Err(other.wrong("delete"));
            }
        }
        process.drain().await;
        self.execs().remove(exec_id);
        let _ = fs::remove_file(process.gate());
        Ok(process)
    }

    /// Removes everything of a container whose first process ended, or still waits at its gate.
    ///
    /// # Errors
    /// While it runs.
    pub async fn delete(&self) -> Result<()> {
        match self.init.state() {
            State::Exited(..) => {}
            State::Created(_) => {
                self.init.kill(SIGKILL)?;
                self.init.wait().await;
            }
            other @ (State::Added | State::Starting | State::Running(_) | State::Paused(_)) => {
                return Err(other.wrong("delete"));
            }
        }
        // Whoever outlived the first process would keep the streams and the root file system.
        self.ground.cgroup.kill(SIGKILL)?;
        self.init.drain().await;
        if let Some(watch) = &self.oom_watch {
            watch.abort();
        }
        self.ground.clear().await;
        Ok(())
    }

    /// Freezes all its processes.
    ///
    /// # Errors
    /// Unless it runs.
    pub async fn pause(&self) -> Result<()> {
        self.init.change(State::pause)?;
        let frozen = self.ground.cgroup.freeze(true).await;
        if frozen.is_err() {
            self.ground.cgroup.write("cgroup.freeze", "0")?;
            self.init.change(State::resume)?;
        }
        frozen
    }

    /// Lets all its processes go on.
    ///
    /// # Errors
    /// Unless it is paused.
    pub async fn resume(&self) -> Result<()> {
        self.init.change(State::resume)?;
        self.ground.cgroup.freeze(false).await
    }

    fn exec(&self, exec_id: &str) -> Result<Exec> {
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("container {} has no process {exec_id}", self.id())))
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a container stands on: directories, mounts and a cgroup.
struct Ground {
    id: String,
    bundle: PathBuf,
    run_dir: PathBuf,
    cgroup: Cgroup,
}

impl Ground {
    async fn lay(request: &CreateTaskRequest) -> Result<Self> {
        let bundle = PathBuf::from(&request.bundle);
        if !bundle.is_absolute() || !bundle.join("config.json").is_file() {
            return Err(Error::Invalid(format!("the bundle {} holds no config.json", request.bundle)));
        }
        let ground = Self {
            cgroup: Cgroup::create(&request.id)?,
            run_dir: Path::new(RUN_DIR).join(&request.id),
            id: request.id.clone(),
            bundle,
        };
        if let Err(error) = ground.prepare(&request.rootfs) {
            ground.clear().await;
            return Err(error);
        }
        Ok(ground)
    }

    fn prepare(&self, rootfs: &[Mount]) -> Result<()> {
        fs::create_dir_all(&self.run_dir).attempt(format_args!("make {}", self.run_dir.display()))?;
        let root = self.bundle.join("rootfs");
        for mount in rootfs {
            let target = root.join(mount.target.trim_start_matches('/'));
            mounts::mount_on(&target, &mount.type_, &mount.source, &mount.options)?;
        }
        Ok(())
    }

    fn order(&self, process: &Process, kind: Kind) -> Order {
        Order {
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            cgroup: self.cgroup.name().to_owned(),
            gate: process.gate().clone(),
            terminal: process.stdio.terminal,
            kind,
        }
    }

    /// Removes all of it, as far as it goes.
    async fn clear(&self) {
        if let Err(error) = self.cgroup.remove().await {
            warn!(container = self.id, %error, "cgroup left behind");
        }
        let _ = fs::remove_dir_all(&self.run_dir);
        match mounts::unmount_below(&self.bundle) {
            Ok(()) if self.bundle.starts_with(GUEST_BUNDLE_DIR) => {
                let _ = fs::remove_dir_all(&self.bundle);
            }
            Ok(()) => {}
            // Never delete through a mount: the files are the host's.
            Err(error) => warn!(container = self.id, %error, "bundle left behind"),
        }
    }
}

/// Tells the host each time the kernel ends a process of the container for want of memory.
fn watch_memory(ground: &Ground, events: &Events) -> Option<AbortHandle> {
    let mut watch = ground.cgroup.watch("memory.events").ok()?;
    let (id, events) = (ground.id.clone(), events.clone());
    let kills = |text: &str| field(text, "oom_kill").and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
    let watching = async move {
        let mut seen = kills(&watch.read()?);
        loop {
            watch.changed().await?;
            let count = kills(&watch.read()?);
            if count > seen {
                let mut event = Event::new();
                event.set_out_of_memory(OutOfMemory { container_id: id.clone(), ..Default::default() });
                events.push(event);
                seen = count;
            }
        }
    };
    let task = tokio::spawn(async move {
        // Ends with the cgroup.
        let _: Result<()> = watching.await;
    });
    Some(task.abort_handle())
}

/// Where `pid` is in the tree: a container may have made cgroups of its own, and then has no processes above them.
fn cgroup_of(pid: Pid) -> Option<PathBuf> {
    let listed = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = listed.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}
