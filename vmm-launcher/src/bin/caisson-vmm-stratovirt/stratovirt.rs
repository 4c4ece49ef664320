//! One StratoVirt process with its VM.

use std::{
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use caisson_protocol::vmm::{
    Block, CapabilitiesResponse, CreateRequest, Device, ExitReason, GuestDevice, ResizeBalloonRequest, VmConfig,
    VmState, WaitResponse, device::Kind,
};
use caisson_vmm_launcher::{
    Error, Result,
    ability::never,
    appear::until_exists,
    ask, balloon,
    block_driver::Bus,
    console::{Audience, Console},
    guest_vsock::GuestVsock,
    hypervisor::{Adopted, Created, Hypervisor},
    kernel, kvm, metrics,
    options::{describe, parse, with_defaults},
    outlive::{Lifetime, Memory, connect as connect_to},
    process::{Ended, Process, Streams},
    qmp::Qmp,
    request,
    size::Sizes,
    sockets::Sockets,
    tap,
    virtiofsd::{FileServers, KnownFileServers, Virtiofsd},
    vm::exit,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{net::UnixStream, task::spawn_blocking, time::timeout};
use tracing::{debug, info};

use crate::{
    command_line::CommandLine,
    options::{DOCS, Options},
    probe,
    slots::{Names, Slots, single_queue},
};

/// StratoVirt is ready in a tenth of a second, unless the host is very busy.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// What `-smp` accepts.
const MAX_VCPUS: u32 = 254;
/// The image is the first disk.
const IMAGE_ID: &str = "image";

/// To wait for its vCPUs it sleeps, which the filter of its microvm ends it for: `syscall_whitelist`,
/// machine/src/micro_common/syscall.rs of version 2.5.0.
const NO_PAUSE: &str = "StratoVirt's own system call filter ends its microvm when it is paused; seccomp = false in the \
                        configuration does without the filter";

/// Its `migrate` and `-incoming` save and restore memory, processors, the serial port and disks. But in version 2.5.0
/// `start_incoming_migration`, machine/src/lib.rs, starts the vCPUs whatever `-S` says. `add_virtio_rng` there leaves the
/// device's queues out: who reads /dev/hwrng waits for ever. And `get_state_vec`, virtio/src/vhost/kernel/vsock.rs, tells the
/// guest of its new vsock after the queue for that was saved: the guest hears of it when the first connection comes, which
/// is lost, and one that is saved a second time never does. Restoring needs `seccomp = false`, as pausing.
const NO_SNAPSHOT: &str = "a guest that StratoVirt restores runs before it is told to, has lost its rng device, and may have \
                           lost its vsock";

/// microvm has a virtio-mem device. But in version 2.5.0 StratoVirt's own filter ends it when memory comes. Without the filter,
/// `set_mem_table`, virtio/src/vhost/kernel/mod.rs, is called only when the guest starts: its vsock stands still with the
/// first buffer in memory that has come later. And `unplug_range`, virtio/src/device/memory.rs, unmaps what the guest gives
/// back, while `plug_range` takes it for mapped: when it comes again, a vCPU ends.
const NO_MORE_MEMORY: &str = "StratoVirt's vsock does not reach memory that has come later, and a guest dies of memory that \
                              comes a second time";

/// For `Capabilities`, whatever StratoVirt has.
const MISSING: &[(&str, &str)] = &[
    ("pause", NO_PAUSE),
    ("pmem", "StratoVirt's microvm is given none"),
    ("vfio", "it needs StratoVirt's q35, which is not used"),
    ("net-hotplug", "StratoVirt drops what is sent to a card that has come after its guest started"),
    ("fs-hotplug", "microvm takes disks only"),
    ("snapshot", NO_SNAPSHOT),
    ("resize-vcpus", "it needs StratoVirt's q35, which is not used"),
    ("resize-memory", NO_MORE_MEMORY),
    ("tdx", "StratoVirt has no confidential guests"),
    ("sev-snp", "StratoVirt has no confidential guests"),
];

/// A running StratoVirt.
pub struct StratoVirt {
    process: Process,
    qmp: Qmp,
    console: Console,
    file_servers: FileServers,
    slots: Slots,
    /// Before it was it is paused, too, as far as StratoVirt tells.
    booted: AtomicBool,
    constant: Constant,
    /// Kept for another launcher.
    sockets: Mutex<Option<Sockets>>,
}

/// What another launcher needs to know that does not change.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Constant {
    sizes: Sizes,
    /// Whether it is confined by its system call filter.
    filtered: bool,
    console_log: Option<PathBuf>,
    protocol: PathBuf,
    serial: PathBuf,
    /// Those two and the file servers'.
    sockets: Vec<PathBuf>,
    file_servers: KnownFileServers,
}

/// What another launcher needs to know, beside StratoVirt's process.
#[derive(Debug, Deserialize, Serialize)]
struct Own {
    constant: Constant,
    slots: Names,
    booted: bool,
}

impl Hypervisor for StratoVirt {
    const NAME: &'static str = "stratovirt";
    const DEFAULT_PATH: &'static str = "/usr/bin/stratovirt";

    const OUTLIVES_LAUNCHER: Result<(), &'static str> = Ok(());

    fn options() -> serde_json::Value {
        with_defaults(describe::<Options>(DOCS), &[("kernel", kernel::BZIMAGE.into())])
    }

    async fn capabilities(path: &Path, _options: &str) -> Result<CapabilitiesResponse> {
        let version = ask::version(path, "-version", "StratoVirt", "StratoVirt ").await?;
        kvm::require("StratoVirt").await?;
        let mut able = CapabilitiesResponse {
            version,
            accelerator: "kvm".into(),
            accelerator_reason: "/dev/kvm runs guests".into(),
            ..Default::default()
        };
        never(MISSING, &mut able);
        probe::devices(path, &mut able).await?;
        Ok(able)
    }

    async fn create(request: &CreateRequest, audience: Audience) -> Result<Created<Self>> {
        let vm = request::check(request, MAX_VCPUS)?;
        let options: Options = parse(&request.options)?;
        options.block_device_driver.check(Bus::Mmio)?;
        kvm::require("StratoVirt").await?;
        let mut plan = Plan::new(vm, &options, Path::new(&request.run_dir), Lifetime::of(request)?)?;
        let devices = vm
            .devices
            .iter()
            .map(|device| Ok(GuestDevice { id: device.id.clone(), address: plan.add(device)?, ..Default::default() }))
            .collect::<Result<Vec<_>>>()?;
        let hypervisor = plan.start(vm, &options, audience).await?;
        Ok(Created { hypervisor, devices })
    }

    async fn boot(&self) -> Result<()> {
        self.resume().await?;
        self.booted.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Without ACPI there is no button to press.
    async fn power_off(&self) -> Result<()> {
        Err(Error::Unsupported("asking a guest to power off is not supported with StratoVirt's microvm".into()))
    }

    async fn pause(&self) -> Result<()> {
        if self.constant.filtered {
            return Err(Error::Unsupported(NO_PAUSE.into()));
        }
        self.qmp.execute("stop", json!({})).await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        self.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn attach(&self, device: &Device) -> Result<GuestDevice> {
        let address = self.slots.attach(device, &self.qmp).await?;
        Ok(GuestDevice { id: device.id.clone(), address, ..Default::default() })
    }

    async fn detach(&self, id: &str) -> Result<()> {
        self.slots.detach(id, &self.qmp).await
    }

    async fn resize_balloon(&self, request: &ResizeBalloonRequest) -> Result<u64> {
        balloon::resize(request, &self.constant.sizes, &self.qmp).await
    }

    fn kill(&self) {
        self.process.kill();
    }

    async fn ended(&self) -> WaitResponse {
        let (ended, helper) = self.process.ended_with(self.file_servers.failed()).await;
        self.console.drained().await;
        self.file_servers.end().await;
        drop(self.sockets.lock().expect("nobody panics with the sockets").take());
        let (reason, detail) = match (helper, self.console.panic()) {
            (Some(helper), _) => (ExitReason::HYPERVISOR_FAILED, helper),
            (None, Some(words)) => (ExitReason::GUEST_PANIC, format!("the guest kernel panicked: {words}")),
            (None, None) if ended.well() => (ExitReason::GUEST_SHUTDOWN, "the guest ended itself".to_owned()),
            (None, None) => (ExitReason::HYPERVISOR_FAILED, self.process.describe(&ended)),
        };
        WaitResponse { console_tail: self.console.tail(), ..exit(reason, detail) }
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn console(&self) -> &Console {
        &self.console
    }

    fn remember(&self) -> Result<Memory> {
        let booted = self.booted.load(Ordering::Relaxed);
        let own = Own { constant: self.constant.clone(), slots: self.slots.names(), booted };
        Ok(Memory {
            process: self.process.known(),
            console_log: self.constant.console_log.clone(),
            own: serde_json::to_value(own).expect("paths of requests are UTF-8"),
        })
    }

    async fn adopt(_: &Path, memory: Memory) -> Result<Adopted<Self>> {
        let Own { constant, slots, booted } = memory.own()?;
        let process = Process::adopt(&memory.process)?;
        let qmp = Qmp::over("StratoVirt", connect_to(&memory.process, &constant.protocol).await?);
        qmp.negotiate().await?;
        let serial = connect_to(&memory.process, &constant.serial).await?;
        let console = Console::adopt(serial, constant.console_log.as_deref())?;
        let status = qmp.execute("query-status", json!({})).await?;
        let state = match status["running"].as_bool() {
            Some(true) => VmState::RUNNING,
            _ if booted => VmState::PAUSED,
            _ => VmState::CREATED,
        };
        let hypervisor = Self {
            file_servers: FileServers::adopt(&constant.file_servers)?,
            process,
            qmp,
            console,
            slots: Slots::adopt(slots),
            booted: AtomicBool::new(state != VmState::CREATED),
            sockets: Mutex::new(Some(Sockets(constant.sockets.clone()))),
            constant,
        };
        Ok(Adopted { hypervisor, state })
    }

    /// It answers questions for its statistics with zeros: what is known is known without it.
    async fn metrics(&self) -> Result<String> {
        let mut known = metrics::Metrics::default();
        known.size(self.constant.sizes.now);
        Ok(known.text())
    }
}

/// A StratoVirt that is not yet started. Dropping it ends what was started for it.
struct Plan<'a> {
    run_dir: &'a Path,
    line: CommandLine,
    slots: Slots,
    file_servers: FileServers,
    /// Where they listen, until StratoVirt has connected.
    sockets: Sockets,
    lifetime: Lifetime,
}

impl<'a> Plan<'a> {
    fn new(vm: &VmConfig, options: &Options, run_dir: &'a Path, lifetime: Lifetime) -> Result<Self> {
        let shared_memory = vm.devices.iter().any(|device| matches!(device.kind, Some(Kind::Fs(_))));
        let line = CommandLine::new(vm, options, shared_memory)?;
        let mut plan = Self {
            run_dir,
            line,
            slots: Slots::default(),
            file_servers: FileServers::default(),
            sockets: Sockets::default(),
            lifetime,
        };
        if !vm.image.is_empty() {
            let image = Block { path: vm.image.clone(), read_only: true, ..Default::default() };
            plan.slots.take(IMAGE_ID, &Kind::Block(image.clone()))?;
            plan.line.block(IMAGE_ID, &image)?;
        }
        Ok(plan)
    }

    /// Adds one device, and answers where the guest finds it.
    fn add(&mut self, device: &Device) -> Result<String> {
        let id = device.id.as_str();
        let kind = request::kind(device)?;
        match kind {
            Kind::Block(block) => {
                self.slots.take(id, kind)?;
                self.line.block(id, block)?;
                return Ok(format!("serial:{id}"));
            }
            Kind::Net(net) => {
                single_queue(id, net)?;
                self.slots.take(id, kind)?;
                tap::open(net)?.into_iter().for_each(|queue| self.line.net(id, net, queue));
            }
            Kind::Vsock(vsock) => {
                let device = GuestVsock::open(Path::new(&vsock.socket), self.run_dir, &Lifetime::of_launcher())?;
                let GuestVsock::Kernel { vhost, cid } = device else {
                    return Err(Error::Unsupported(
                        "a guest of StratoVirt needs the kernel's vsock: load the module vhost_vsock, so that there is a \
                         /dev/vhost-vsock"
                            .into(),
                    ));
                };
                self.line.vsock(id, cid, vhost);
                return Ok(format!("vsock:{cid}"));
            }
            Kind::Fs(fs) => {
                let socket = self.run_dir.join(format!("fs-{id}.sock"));
                self.file_servers.add(Virtiofsd::listen(fs, &socket, &self.lifetime)?);
                self.line.fs(id, &fs.tag, &socket)?;
                self.sockets.0.push(socket);
                return Ok(format!("tag:{}", fs.tag));
            }
            Kind::Balloon(balloon) => self.line.balloon(id, balloon),
            Kind::Rng(rng) => self.line.rng(id, &rng.source)?,
            // The serial port, which every guest has.
            Kind::Console(_) => {}
            other => {
                let kind = request::kind_name(other);
                return Err(Error::Unsupported(format!("a {kind} device is not supported with stratovirt")));
            }
        }
        Ok(String::new())
    }

    async fn start(mut self, vm: &VmConfig, options: &Options, audience: Audience) -> Result<StratoVirt> {
        let (protocol, serial) = (self.run_dir.join("qmp.sock"), self.run_dir.join("console.sock"));
        self.line.sockets(&protocol, &serial)?;
        self.sockets.0.extend([protocol.clone(), serial.clone()]);
        self.line.arguments.extend(options.extra_args.iter().cloned());
        debug!(arguments = ?self.line.arguments, "starting StratoVirt");
        let (program, streams) = (Path::new(&vm.hypervisor_path), Streams::none());
        let line = self.line;
        let process = Process::start_with(program, &line.arguments, line.descriptors, streams, &self.lifetime)?;
        match connect(&process, &protocol, &serial).await {
            Ok((qmp, connection)) => {
                let log = vm.devices.iter().find_map(|device| match &device.kind {
                    Some(Kind::Console(console)) => Some(Path::new(console.log.as_str())),
                    _ => None,
                });
                let console = Console::over(connection, log, audience)?;
                info!(pid = process.pid(), "StratoVirt started");
                let constant = Constant {
                    sizes: Sizes::of(vm),
                    filtered: options.seccomp,
                    console_log: log.map(Path::to_owned),
                    protocol,
                    serial,
                    sockets: self.sockets.0.clone(),
                    file_servers: self.file_servers.known(&self.lifetime),
                };
                let sockets = Mutex::new(self.lifetime.is_longer().then_some(self.sockets));
                let (file_servers, slots, booted) = (self.file_servers, self.slots, AtomicBool::new(false));
                Ok(StratoVirt { process, qmp, console, file_servers, slots, booted, constant, sockets })
            }
            Err(error) => {
                process.kill();
                let ended = process.ended().await;
                self.file_servers.end().await;
                Err(error.unwrap_or_else(|| did_not_start(&process, &ended)))
            }
        }
    }
}

/// Connects to both sockets; `None` when StratoVirt ended before.
async fn connect(process: &Process, protocol: &Path, serial: &Path) -> Result<(Qmp, UnixStream), Option<Error>> {
    let connected = async {
        // It listens for the machine protocol before it makes the serial port, and for that when it answers.
        let (path, pid) = (serial.to_owned(), process.pid());
        let waited = spawn_blocking(move || until_exists(&path, pid)).await.unwrap_or(Ok(false));
        if !waited.map_err(|source| Some(Error::host("wait for StratoVirt's sockets")(source)))? {
            return Err(None);
        }
        let refused = |path: &Path| {
            let action = format!("connect to StratoVirt's {}", path.display());
            move |source| Some(Error::host(action)(source))
        };
        let stream = UnixStream::connect(protocol).await.map_err(refused(protocol))?;
        let qmp = Qmp::over("StratoVirt", stream);
        tokio::select! {
            ready = qmp.negotiate() => ready.map_err(Some)?,
            _ = process.ended() => return Err(None),
        }
        let console = UnixStream::connect(serial).await.map_err(refused(serial))?;
        Ok((qmp, console))
    };
    timeout(START_DEADLINE, connected).await.unwrap_or_else(|_| {
        let (pid, seconds) = (process.pid(), START_DEADLINE.as_secs());
        Err(Some(Error::Hypervisor(format!("StratoVirt (pid {pid}) did not answer within {seconds} s of its start"))))
    })
}

fn did_not_start(process: &Process, ended: &Ended) -> Error {
    Error::Hypervisor(format!("StratoVirt did not start: {}", process.describe(ended)))
}
