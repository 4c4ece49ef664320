//! The launcher process of this sandbox's virtual machine, and its socket.

use std::{
    env, io,
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_protocol::{
    containerd::shim_async::Client, deadline, listen, paths::SandboxDir, processes::ProcessList, vmm::AdoptRequest,
    vmm_ttrpc::VmmClient,
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::Mutex,
    task::spawn_blocking,
    time::timeout,
};
use tracing::warn;

use crate::{Error, Result};

/// A launcher that was told to end kills its VM and removes its files.
const END_DEADLINE: Duration = Duration::from_secs(5);
/// It gives its hypervisor 30 s to answer.
const ADOPTION_DEADLINE: Duration = Duration::from_secs(40);

/// A running `caisson-vmm-<hypervisor>`; killed when dropped.
pub struct Launcher {
    child: Mutex<Child>,
    /// Of its VM, which may outlive it.
    processes: ProcessList,
    /// For calls.
    pub client: VmmClient,
    /// On the host.
    pub pid: u32,
    /// Those that it goes on for, by their pids.
    lost: Vec<u32>,
}

impl Launcher {
    /// Starts the launcher of `hypervisor` with its socket in `dir`. It can be called at once: calls wait in the socket.
    pub async fn start(hypervisor: &str, dir: &SandboxDir, log_level: &str) -> Result<Self> {
        let program = find(&format!("caisson-vmm-{hypervisor}"))?;
        let socket = dir.vmm_socket();
        let listener =
            listen::bind(&socket).map_err(Error::host(format!("make the launcher's socket {}", socket.display())))?;
        let child = Command::new(&program)
            .arg("serve")
            .current_dir(dir.path())
            .env("CAISSON_LOG", log_level)
            .stdin(listen::as_stdin(listener))
            .stdout(std::process::Stdio::null())
            // What it starts stays in its group, by which this process finds what it inherits.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(Error::host(format!("start the launcher {}", program.display())))?;
        let pid = child.id().unwrap_or_default();
        let stream = UnixStream::connect(&socket).await.map_err(Error::host("connect to the launcher"))?;
        let client = VmmClient::new(Client::new(stream.into()));
        Ok(Self { child: Mutex::new(child), processes: ProcessList::in_dir(dir.path()), client, pid, lost: Vec::new() })
    }

    /// Starts another one in place of a launcher that was lost, and has it go on with the VM. When this fails the VM and
    /// everything that belongs to it has ended.
    pub async fn replace(lost: &Self, hypervisor: &str, dir: &SandboxDir, log_level: &str) -> Result<Self> {
        // It may hang and not be dead: then there would be two.
        if let Err(error) = lost.child.lock().await.kill().await {
            warn!(pid = lost.pid, %error, "the lost launcher cannot be killed");
        }
        let adopted = async {
            let launcher = Self::start(hypervisor, dir, log_level).await?;
            let request = AdoptRequest { state_dir: text(dir.path()), ..Default::default() };
            let adopted = launcher.client.adopt(deadline(ADOPTION_DEADLINE), &request).await;
            match adopted.map_err(Error::remote("go on with the virtual machine of a lost launcher")) {
                Ok(_) => Ok(Self { lost: [&lost.lost[..], &[lost.pid]].concat(), ..launcher }),
                Err(error) => {
                    launcher.end().await;
                    Err(error)
                }
            }
        };
        let adopted = adopted.await;
        if adopted.is_err() {
            lost.end_processes().await;
        }
        adopted
    }

    /// Ends the launcher, which ends its VM by force if it still runs.
    pub async fn end(&self) {
        let mut child = self.child.lock().await;
        // The pid cannot belong to another process: the child has not been waited for.
        if let Some(pid) = child.id()
            && let Err(error) = kill(Pid::from_raw(pid as i32), Signal::SIGTERM)
        {
            warn!(pid, %error, "the launcher cannot be told to end");
        }
        if timeout(END_DEADLINE, child.wait()).await.is_err() {
            warn!(pid = self.pid, "the launcher did not end in time and is killed");
            if let Err(error) = child.kill().await {
                warn!(pid = self.pid, %error, "the launcher cannot be killed");
            }
        }
        self.end_processes().await;
    }

    /// Ends what a launcher that was killed has left.
    async fn end_processes(&self) {
        let processes = self.processes.clone();
        if let Ok(Err(error)) = spawn_blocking(move || processes.end_all(END_DEADLINE)).await {
            warn!(%error, "not all processes of the virtual machine could be ended");
        }
        self.reap_inherited().await;
        reap_group(self.pid).await;
    }

    /// Waits for those whom this process has inherited from lost launchers, so that none stays as a dead one. The VM has
    /// ended: until then a launcher may come that has to tell how the hypervisor did, which the first to ask takes away.
    pub async fn reap_inherited(&self) {
        for lost in &self.lost {
            reap_group(*lost).await;
        }
    }
}

/// The group is about to end, and its leader has been waited for where the runtime waits for it.
async fn reap_group(leader: u32) {
    let ended = async {
        let mut child_ended = signal(SignalKind::child())?;
        loop {
            match waitpid(Pid::from_raw(-(leader as i32)), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => drop(child_ended.recv().await),
                Ok(_) => {}
                Err(Errno::ECHILD) => return Ok(()),
                Err(error) => return Err(io::Error::from(error)),
            }
        }
    };
    if let Err(error) = timeout(END_DEADLINE, ended).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        warn!(launcher = leader, %error, "not all processes of a launcher have ended");
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Finds one of our programs: beside this one, or on the PATH.
fn find(name: &str) -> Result<PathBuf> {
    let beside = env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
    let path = env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| Error::Host {
            action: format!("find the launcher {name} beside containerd-shim-caisson-v2 or on the PATH"),
            source: io::ErrorKind::NotFound.into(),
        })
}
