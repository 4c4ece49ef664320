//! A sandbox's virtual machine with its agent: from nothing to ready, and down again.

use std::{
    fs,
    sync::{Arc, Mutex, RwLock},
    time::{Duration, Instant},
};

use caisson_protocol::{
    address::{GuestListener, GuestVsock},
    config::SandboxConfig,
    containerd::shim_async::{Client, TaskClient},
    deadline,
    guest_ttrpc::GuestClient,
    no_deadline,
    status::{Status, sentence},
    vmm::{self, WaitResponse},
};
use nix::sys::prctl::set_child_subreaper;
use tokio::{sync::watch, time::timeout};
use tracing::{info, warn};

use crate::{
    Error, Result,
    files::{Preparation, Ways},
    launcher::Launcher,
    process::lock,
    record::Record,
    stages::Stages,
    vm_request::{VSOCK_DEVICE, create_request, setup_request},
};

/// For calls whose deadline the configuration does not set.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// A launcher that lives for less is not replaced.
const REPLACEMENT_INTERVAL: Duration = Duration::from_secs(10);

/// What an error quotes of the guest's console.
const QUOTED_LINES: usize = 8;

/// A virtual machine whose agent answers.
pub struct Vm {
    /// Serves its contract; another one after that one was lost.
    launcher: RwLock<Arc<Launcher>>,
    /// How a lost launcher is replaced, where the VM outlives it.
    replacement: Option<Replacement>,
    /// Whether nobody wants it any more. Locked while the launcher is replaced.
    ending: tokio::sync::Mutex<bool>,
    /// How its containers get at the host's files.
    pub ways: Ways,
    /// containerd's Task service in the guest.
    pub task: TaskClient,
    /// The guest around the containers.
    pub guest: GuestClient,
    /// For the standard streams.
    pub vsock: GuestVsock,
    /// For any one request to the agent.
    pub request_limit: Duration,
    /// The hypervisor, on the host.
    pub pid: u32,
    /// The file that it was configured by.
    pub configuration: String,
}

/// What it takes to start another launcher.
struct Replacement {
    hypervisor: String,
    log_level: String,
    /// When it was last done.
    done: Mutex<Option<Instant>>,
}

/// What a sandbox's first container adds to the configuration.
#[derive(Debug)]
pub struct Needs {
    /// The guest's host name.
    pub hostname: String,
    /// Memory on top of what the guest itself needs.
    pub memory_mib: u64,
    /// At least so many processors.
    pub vcpus: u32,
    /// Whether other containers will come.
    pub more_containers: bool,
}

impl Vm {
    /// Boots a virtual machine with the first container's disks, and waits for its agent's call, unless `stop` turns
    /// true. When this fails, nothing is left running.
    pub async fn boot(
        config: SandboxConfig,
        needs: Needs,
        files: &mut Preparation,
        record: &mut Record,
        stages: &mut Stages,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Self> {
        let (limits, configuration) = (config.timeouts.clone().unwrap_or_default(), config.origin.clone());
        let ways = files.ways.clone();
        let (hypervisor, log_level) = (config.hypervisor.clone(), config.log_level.clone());
        let (dir, directory) = (&ways.dir, ways.dir.launcher());
        fs::create_dir_all(&directory).map_err(Error::host(format!("make {}", directory.display())))?;
        let launcher = Launcher::start(&config.hypervisor, dir, &config.log_level).await?;
        record.hypervisor = config.hypervisor.clone();
        record.set_launcher(launcher.pid);
        record.save(dir).map_err(Error::host("write sandbox.json"))?;
        stages.end("launcher");

        let ready = tokio::select! {
            ready = boot_guest(&launcher, config, &needs, files, record, stages) => ready,
            _ = stop.wait_for(|stop| *stop) => Err(Error::Stopped),
        };
        match ready {
            Ok(Ready { pid, vsock, client, outlives_launcher }) => Ok(Self {
                launcher: RwLock::new(Arc::new(launcher)),
                replacement: outlives_launcher.then(|| Replacement { hypervisor, log_level, done: Mutex::default() }),
                ending: false.into(),
                ways,
                guest: GuestClient::new(client.clone()),
                task: TaskClient::new(client),
                vsock,
                request_limit: Duration::from_millis(limits.request_ms.into()),
                pid,
                configuration,
            }),
            Err(error) => {
                launcher.end().await;
                Err(error)
            }
        }
    }

    /// Its launcher, as long as that lives.
    pub fn launcher(&self) -> Arc<Launcher> {
        self.launcher.read().expect("no writer panics").clone()
    }

    /// Waits for the end of the virtual machine and says how it ended. It goes on when its launcher is lost, if it can.
    pub async fn wait(&self) -> WaitResponse {
        loop {
            let launcher = self.launcher();
            let lost = match launcher.client.wait(no_deadline(), &vmm::WaitRequest::new()).await {
                Ok(end) => {
                    launcher.reap_inherited().await;
                    return end;
                }
                Err(error) => launcher_lost(error),
            };
            match self.replace(&launcher).await {
                Ok(true) => {}
                Ok(false) => return lost,
                Err(error) => {
                    return WaitResponse { detail: format!("{}: {}", lost.detail, sentence(&error)), ..lost };
                }
            }
        }
    }

    /// Whether there is another launcher in place of `lost`.
    async fn replace(&self, lost: &Launcher) -> Result<bool> {
        let ending = self.ending.lock().await;
        let Some(Replacement { hypervisor, log_level, done }) = &self.replacement else { return Ok(false) };
        if *ending {
            return Ok(false);
        }
        // One that dies again and again is no help.
        if lock(done).replace(Instant::now()).is_some_and(|last| last.elapsed() < REPLACEMENT_INTERVAL) {
            lost.end().await;
            return Ok(false);
        }
        let dir = &self.ways.dir;
        let launcher = Launcher::replace(lost, hypervisor, dir, log_level).await?;
        warn!(lost = lost.pid, pid = launcher.pid, "the launcher was lost, and another one goes on");
        if let Some(mut record) = Record::load(dir) {
            record.set_launcher(launcher.pid);
            if let Err(error) = record.save(dir) {
                warn!(%error, "sandbox.json still names the lost launcher");
            }
        }
        *self.launcher.write().expect("no reader panics") = Arc::new(launcher);
        Ok(true)
    }

    /// What the launcher and its hypervisor count, Prometheus text format.
    pub async fn launcher_metrics(&self) -> Result<String> {
        let metrics = self.launcher().client.metrics(deadline(REQUEST_DEADLINE), &vmm::MetricsRequest::new()).await;
        Ok(metrics.map_err(Error::remote("measure the virtual machine"))?.text)
    }

    /// Ends the virtual machine at once. Its wait ends too; the launcher stays until [`Self::end`].
    pub async fn stop(&self) -> Result<()> {
        let stop = self.launcher().client.stop(deadline(REQUEST_DEADLINE), &vmm::StopRequest::new()).await;
        stop.map(drop).map_err(Error::remote("stop the virtual machine"))
    }

    /// Ends the virtual machine with everything that belongs to it. The containers are gone and their writes are with
    /// the host: there is nothing to wait for in the guest.
    pub async fn end(&self) {
        *self.ending.lock().await = true;
        self.launcher().end().await;
    }
}

/// A guest whose agent has answered.
struct Ready {
    pid: u32,
    vsock: GuestVsock,
    client: Client,
    outlives_launcher: bool,
}

async fn boot_guest(
    launcher: &Launcher,
    config: SandboxConfig,
    needs: &Needs,
    files: &mut Preparation,
    record: &mut Record,
    stages: &mut Stages,
) -> Result<Ready> {
    let limits = config.timeouts.clone().unwrap_or_default();
    let (hypervisor, origin) = (config.hypervisor.clone(), config.origin.clone());
    let disks = files.disks().await?;
    let (dir, shares_directory) = (&files.ways.dir, files.ways.shares_directory);
    stages.end("disks");
    let request = create_request(config, needs, disks, dir);
    let created = launcher
        .client
        .create(deadline(millis(limits.create_ms)), &request)
        .await
        .map_err(Error::remote(format!("start a virtual machine with {hypervisor}")))?;
    record.vmm_pid = created.pid;
    if created.outlives_launcher {
        // Then the next launcher can tell how it ended: its status is there until this process asks for it.
        set_child_subreaper(true).map_err(|error| Error::host("adopt the children of a launcher")(error.into()))?;
    }
    record.save(dir).map_err(Error::host("write sandbox.json"))?;
    if let Some(store) = &files.ways.disks {
        store.disks.place(&created.devices);
    }
    let vsock: GuestVsock = created
        .devices
        .iter()
        .find(|device| device.id == VSOCK_DEVICE)
        .and_then(|device| device.address.parse().ok())
        .ok_or_else(|| Error::Boot(format!("the launcher of {hypervisor} did not say where the guest's vsock is")))?;
    let agent = vsock.listen_for_agent().map_err(Error::host("listen for the guest's agent"))?;
    stages.end("create");

    let boot = launcher.client.boot(deadline(REQUEST_DEADLINE), &vmm::BootRequest::new()).await;
    boot.map_err(Error::remote("let the virtual machine run"))?;
    let client = wait_for_agent(launcher, &agent, millis(limits.boot_ms), &origin).await?;
    let boot = stages.lap();

    let setup = GuestClient::new(client.clone())
        .setup(deadline(millis(limits.request_ms)), &setup_request(needs, shares_directory))
        .await;
    let info = setup.map_err(Error::remote("set the guest up"))?.info.unwrap_or_default();
    let setup = stages.lap();
    // The guest's own clocks, which begin when its kernel first reads the time.
    let (kernel, agent) = (Duration::from_nanos(info.kernel_ns), Duration::from_nanos(info.agent_ns));
    stages.add("vmm_to_kernel_clock", boot.saturating_sub(kernel.saturating_add(agent)));
    stages.add("kernel", kernel);
    stages.add("agent", agent);
    stages.add("setup", setup);
    info!(kernel = %info.kernel_release.escape_debug(), agent = %info.agent_version.escape_debug(), "guest ready");
    Ok(Ready { pid: created.pid, vsock, client, outlives_launcher: created.outlives_launcher })
}

fn millis(value: u32) -> Duration {
    Duration::from_millis(value.into())
}

/// Waits for the agent's call, the end of the VM or the deadline, whichever comes first.
async fn wait_for_agent(launcher: &Launcher, agent: &GuestListener, limit: Duration, origin: &str) -> Result<Client> {
    let call_or_end = async {
        tokio::select! {
            call = agent.accept() => Ok(call),
            end = wait_for_end(launcher) => Err(end),
        }
    };
    match timeout(limit, call_or_end).await {
        Ok(Ok(call)) => Ok(Client::new(call.map_err(Error::host("take the agent's call"))?.into_ttrpc())),
        Ok(Err(end)) => Err(Error::Boot(format!(
            "the guest ended before its agent was ready: {}; check kernel, initrd or image, and memory in {origin}{}",
            end.detail,
            quoted(&end.console_tail)
        ))),
        Err(_) => {
            let state = launcher.client.state(deadline(REQUEST_DEADLINE), &vmm::StateRequest::new()).await;
            Err(Error::Boot(format!(
                "the guest's agent did not answer within {} s; check the initrd or image in {origin}, or raise its \
                 boot_timeout_ms{}",
                limit.as_secs_f32(),
                quoted(&state.unwrap_or_default().console_tail),
            )))
        }
    }
}

async fn wait_for_end(launcher: &Launcher) -> WaitResponse {
    match launcher.client.wait(no_deadline(), &vmm::WaitRequest::new()).await {
        Ok(end) => end,
        Err(error) => launcher_lost(error),
    }
}

fn launcher_lost(error: ttrpc::Error) -> WaitResponse {
    WaitResponse {
        reason: vmm::ExitReason::HYPERVISOR_FAILED.into(),
        detail: format!("the launcher ended unexpectedly: {}", Status::from(error)),
        ..Default::default()
    }
}

/// The guest's last words, for the end of a sentence. What a panic says is before its trace.
fn quoted(console: &str) -> String {
    let lines: Vec<&str> = console.trim().lines().collect();
    let end = lines.iter().position(|line| line.contains("Kernel panic")).map_or(lines.len(), |panic| panic + 1);
    let start = end.saturating_sub(QUOTED_LINES);
    match &lines[start..end] {
        [] => "; the console is empty".into(),
        last => format!("; the console's last lines:\n{}", last.join("\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_quoted_without_its_trace() {
        let console = "[0.1] no root\n[0.2] Kernel panic - not syncing: VFS\n[0.3] Call Trace:\n[0.4] panic+0x1\n";
        assert_eq!(
            quoted(console),
            "; the console's last lines:\n[0.1] no root\n[0.2] Kernel panic - not syncing: VFS"
        );
    }

    #[test]
    fn only_the_last_lines_are_quoted() {
        let console: String = (0..100).map(|line| format!("line {line}\n")).collect();
        assert!(quoted(&console).starts_with("; the console's last lines:\nline 92\n"), "{}", quoted(&console));
    }

    #[test]
    fn a_silent_guest_is_said_to_be_silent() {
        assert_eq!(quoted("\n"), "; the console is empty");
    }
}
