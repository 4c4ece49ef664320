//! A sandbox's virtual machine with its agent: from nothing to ready, and down again.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use caisson_protocol::{
    address::{GuestListener, GuestVsock},
    config::SandboxConfig,
    containerd::shim_async::{Client, TaskClient},
    deadline,
    guest::{SetupRequest, Storage},
    guest_ttrpc::GuestClient,
    no_deadline,
    paths::{GUEST_SHARED_DIR, SHARED_TAG, SandboxDir},
    status::Status,
    vmm::{self, Console, CreateRequest, Device, Fs, Rng, VmConfig, Vsock, WaitResponse, device::Kind},
};
use protobuf::MessageField;
use tokio::{sync::watch, time::timeout};
use tracing::info;

use crate::{
    Error, Result,
    launcher::Launcher,
    mount::make_shared,
    record::{Record, start_ticks},
    stages::Stages,
};

/// For calls whose deadline the configuration does not set.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

const VSOCK_DEVICE: &str = "vsock";
/// What an error quotes of the guest's console.
const QUOTED_LINES: usize = 8;

/// A virtual machine whose agent answers.
pub struct Vm {
    launcher: Launcher,
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
}

impl Vm {
    /// Boots a virtual machine and waits for its agent's call, unless `stop` turns true. When this fails, nothing is
    /// left running.
    pub async fn boot(
        config: SandboxConfig,
        needs: Needs,
        dir: &SandboxDir,
        record: &mut Record,
        stages: &mut Stages,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Self> {
        let limits = config.timeouts.clone().unwrap_or_default();
        for directory in [dir.shared(), dir.launcher()] {
            fs::create_dir_all(&directory).map_err(Error::host(format!("make {}", directory.display())))?;
        }
        let launcher = Launcher::start(&config.hypervisor, dir, &config.log_level).await?;
        record.hypervisor = config.hypervisor.clone();
        record.launcher_pid = launcher.pid;
        record.launcher_start_ticks = start_ticks(launcher.pid).unwrap_or_default();
        record.save(dir).map_err(Error::host("write sandbox.json"))?;
        stages.end("launcher");

        let ready = tokio::select! {
            ready = boot_guest(&launcher, config, &needs, dir, record, stages) => ready,
            _ = stop.wait_for(|stop| *stop) => Err(Error::Stopped),
        };
        match ready {
            Ok(Ready { pid, vsock, client }) => Ok(Self {
                launcher,
                guest: GuestClient::new(client.clone()),
                task: TaskClient::new(client),
                vsock,
                request_limit: Duration::from_millis(limits.request_ms.into()),
                pid,
            }),
            Err(error) => {
                launcher.end().await;
                Err(error)
            }
        }
    }

    /// Waits for the end of the virtual machine and says how it ended.
    pub async fn wait(&self) -> WaitResponse {
        wait_for_end(&self.launcher).await
    }

    /// Ends the virtual machine at once. Its wait ends too; the launcher stays until [`Self::end`].
    pub async fn stop(&self) -> Result<()> {
        let stop = self.launcher.client.stop(deadline(REQUEST_DEADLINE), &vmm::StopRequest::new()).await;
        stop.map(drop).map_err(Error::remote("stop the virtual machine"))
    }

    /// Ends the virtual machine with everything that belongs to it. The containers are gone and their writes are with
    /// the host: there is nothing to wait for in the guest.
    pub async fn end(&self) {
        self.launcher.end().await;
    }
}

/// A guest whose agent has answered.
struct Ready {
    pid: u32,
    vsock: GuestVsock,
    client: Client,
}

async fn boot_guest(
    launcher: &Launcher,
    config: SandboxConfig,
    needs: &Needs,
    dir: &SandboxDir,
    record: &mut Record,
    stages: &mut Stages,
) -> Result<Ready> {
    let limits = config.timeouts.clone().unwrap_or_default();
    let (hypervisor, origin) = (config.hypervisor.clone(), config.origin.clone());
    let request = create_request(config, needs, dir);
    let created = launcher
        .client
        .create(deadline(millis(limits.create_ms)), &request)
        .await
        .map_err(Error::remote(format!("start a virtual machine with {hypervisor}")))?;
    record.vmm_pid = created.pid;
    record.save(dir).map_err(Error::host("write sandbox.json"))?;
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

    let setup =
        GuestClient::new(client.clone()).setup(deadline(millis(limits.request_ms)), &setup_request(needs)).await;
    let info = setup.map_err(Error::remote("set the guest up"))?.info.unwrap_or_default();
    let setup = stages.lap();
    // The guest's own clocks, which begin when its kernel first reads the time.
    let (kernel, agent) = (Duration::from_nanos(info.kernel_ns), Duration::from_nanos(info.agent_ns));
    stages.add("vmm_to_kernel_clock", boot.saturating_sub(kernel.saturating_add(agent)));
    stages.add("kernel", kernel);
    stages.add("agent", agent);
    stages.add("setup", setup);
    info!(kernel = %info.kernel_release.escape_debug(), agent = %info.agent_version.escape_debug(), "guest ready");
    Ok(Ready { pid: created.pid, vsock, client })
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
        Err(error) => WaitResponse {
            reason: vmm::ExitReason::HYPERVISOR_FAILED.into(),
            detail: format!("the launcher ended unexpectedly: {}", Status::from(error)),
            ..Default::default()
        },
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

fn create_request(config: SandboxConfig, needs: &Needs, dir: &SandboxDir) -> CreateRequest {
    let shared = config.shared_fs.clone().unwrap_or_default();
    let configured = config.vm.unwrap_or_default();
    let device = |id: &str, kind| Device { id: id.into(), kind: Some(kind), ..Default::default() };
    let devices = vec![
        device("console", Kind::Console(Console { log: text(dir.console_log()), ..Default::default() })),
        device(VSOCK_DEVICE, Kind::Vsock(Vsock { socket: text(dir.vsock_socket()), ..Default::default() })),
        device("rng", Kind::Rng(Rng { source: "/dev/urandom".into(), ..Default::default() })),
        device(
            "shared",
            Kind::Fs(Fs {
                tag: SHARED_TAG.into(),
                shared_dir: text(dir.shared()),
                daemon_path: shared.daemon_path,
                cache: shared.cache,
                extra_args: shared.extra_args,
                ..Default::default()
            }),
        ),
    ];
    let vm = VmConfig {
        vcpus: configured.vcpus.max(needs.vcpus),
        memory_mib: configured.memory_mib + needs.memory_mib,
        kernel_params: format!("{} caisson.log={}", configured.kernel_params, config.log_level).trim().to_owned(),
        devices,
        ..configured
    };
    CreateRequest {
        run_dir: text(dir.launcher()),
        vm: MessageField::some(vm),
        options: config.options,
        ..Default::default()
    }
}

fn setup_request(needs: &Needs) -> SetupRequest {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SetupRequest {
        hostname: needs.hostname.clone(),
        storages: vec![Storage {
            driver: "virtio-fs".into(),
            source: SHARED_TAG.into(),
            mount_point: GUEST_SHARED_DIR.into(),
            ..Default::default()
        }],
        time_unix_ns: now.as_nanos() as i64,
        entropy: entropy(),
        ..Default::default()
    }
}

/// 32 bytes from the host's generator; none when it cannot be read, which costs the guest only a second source.
fn entropy() -> Vec<u8> {
    use std::io::Read;
    let mut bytes = vec![0; 32];
    match fs::File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes)) {
        Ok(()) => bytes,
        Err(_) => Vec::new(),
    }
}

fn text(path: std::path::PathBuf) -> String {
    path.to_string_lossy().into_owned()
}

/// Makes the directory that the guest shares with the host; mounts that come later appear in it on both sides.
pub fn prepare_shared(dir: &SandboxDir) -> Result<()> {
    let shared = dir.shared();
    fs::create_dir_all(&shared).map_err(Error::host(format!("make {}", shared.display())))?;
    make_shared(&shared).map_err(Error::host(format!("share {}", shared.display())))
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
