//! One acrn-dm process with its guest.

use std::{
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::Mutex,
    time::Duration,
};

use caisson_protocol::vmm::{
    CapabilitiesResponse, CreateRequest, Device, ExitReason, GuestDevice, WaitResponse, device::Kind,
};
use caisson_vmm_launcher::{
    Error, Result,
    ability::never,
    appear::until_exists,
    block_driver::Bus,
    console::{Audience, Console, log_of},
    guest_vsock::GuestVsock,
    hypervisor::{Created, Hypervisor},
    kernel,
    options::{describe, parse, with_defaults},
    outlive::Lifetime,
    process::Process,
    request,
    vm::exit,
};
use tokio::{task::spawn_blocking, time::timeout};
use tracing::{debug, info};

use crate::{
    command_line::{self, CommandLine},
    monitor::{self, Monitor},
    options::{DOCS, Options},
    probe,
    pty::Pty,
};

/// `VM_MAXCPU`, devicemodel/core/main.c.
const MAX_VCPUS: u32 = 16;
/// acrn-dm asks for its VM for 5 s before it gives up.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// The hypervisor's own device, `drivers/virt/acrn/hsm.c`.
const HSM: &str = "/dev/acrn_hsm";
/// For `Capabilities`, whatever acrn-dm has.
const MISSING: &[(&str, &str)] = &[
    ("fs", "acrn-dm has no virtio-fs"),
    ("pmem", "acrn-dm has no persistent memory"),
    ("balloon", "acrn-dm has no balloon"),
    ("vfio", "a device is passed through by pci-stub, before the guest starts: use extra_args"),
    ("net-hotplug", "acrn-dm only fills empty disks while its guest runs"),
    ("pause", "acrn-dm cannot pause its guest"),
    ("snapshot", "acrn-dm cannot save its guest"),
    ("resize-vcpus", "ACRN assigns processors when a guest starts"),
    ("resize-balloon", "acrn-dm has no balloon"),
    ("resize-memory", "ACRN assigns memory when a guest starts"),
    ("tdx", "ACRN has no confidential guests"),
    ("sev-snp", "ACRN has no confidential guests"),
];
/// acrn-dm runs its guest from the moment it starts, so a shell holds its place, with its pid, until the guest shall run.
/// What acrn-dm has to say it says on its standard output.
const GATE: &str = r#"read -r _ < "/proc/self/fd/$0" || exit 1; exec "$@" >&2"#;

/// A running acrn-dm, or the shell in its place.
pub struct Acrn {
    process: Process,
    console: Console,
    terminal: Mutex<Option<Pty>>,
    monitor: Monitor,
    start: Mutex<Option<Start>>,
    empty_disks: Mutex<Vec<u8>>,
}

/// What is held until acrn-dm runs.
struct Start {
    gate: std::io::PipeWriter,
    /// Keeps the guest's CID from others until acrn-dm takes it.
    _vhost: Option<OwnedFd>,
}

impl Hypervisor for Acrn {
    const NAME: &'static str = "acrn";
    const DEFAULT_PATH: &'static str = "/usr/bin/acrn-dm";

    const HUGE_PAGES: Result<(), &'static str> = Err("acrn-dm always takes them, and is not asked");

    fn options() -> serde_json::Value {
        with_defaults(describe::<Options>(DOCS), &[("shared_fs", "none".into()), ("kernel", kernel::BZIMAGE.into())])
    }

    async fn capabilities(path: &Path, _options: &str) -> Result<CapabilitiesResponse> {
        let version = probe::version(path).await?;
        if !Path::new(HSM).exists() {
            return Err(Error::Unsupported(format!(
                "there is no {HSM}: this machine is not the Service VM of an ACRN hypervisor"
            )));
        }
        let mut able = CapabilitiesResponse {
            version,
            accelerator: "acrn".into(),
            accelerator_reason: format!("{HSM} is there"),
            ..Default::default()
        };
        never(MISSING, &mut able);
        probe::devices(path, &mut able).await?;
        Ok(able)
    }

    async fn create(request: &CreateRequest, audience: Audience) -> Result<Created<Self>> {
        let vm = request::check(request, MAX_VCPUS)?;
        let options: Options = parse(&request.options)?;
        options.block_device_driver.check(Bus::Pci)?;
        let (console, socket) = Console::open(log_of(&vm.devices), audience)?;
        let terminal = Pty::open(socket).map_err(Error::host("make a terminal for the guest's console"))?;
        let monitor = Monitor::new(Path::new(&request.run_dir));
        let mut line = CommandLine::new(vm, &options, terminal.path(), monitor.socket())?;
        if !vm.image.is_empty() {
            let image = caisson_protocol::vmm::Block { path: vm.image.clone(), read_only: true, ..Default::default() };
            line.block(&image)?;
        }
        let mut vhost = None;
        let mut devices = Vec::with_capacity(vm.devices.len());
        for device in &vm.devices {
            let address = add(device, Path::new(&request.run_dir), &mut line, &mut vhost)?;
            devices.push(GuestDevice { id: device.id.clone(), address, ..Default::default() });
        }
        // The first to be filled is the last here.
        let mut empty_disks = line.empty_disks(options.disk_slots, vm.spare_disks)?;
        empty_disks.reverse();
        let arguments = line.finish(&options, name());

        debug!(?arguments, "starting acrn-dm");
        let (wait, gate) = std::io::pipe().map_err(Error::host("make a pipe"))?;
        let wait = OwnedFd::from(wait);
        let mut shell =
            vec!["-c".to_owned(), GATE.to_owned(), wait.as_raw_fd().to_string(), vm.hypervisor_path.clone()];
        shell.extend(arguments);
        let process = Process::start(Path::new("/bin/sh"), &shell, vec![wait])?.becomes(Path::new(&vm.hypervisor_path));
        info!(pid = process.pid(), "acrn-dm is ready to start");
        let hypervisor = Self {
            process,
            console,
            terminal: Mutex::new(Some(terminal)),
            monitor,
            start: Mutex::new(Some(Start { gate, _vhost: vhost })),
            empty_disks: Mutex::new(empty_disks),
        };
        Ok(Created { hypervisor, devices })
    }

    /// Answers when acrn-dm has made its VM. What it then makes of the VM's devices and kernel is told by its end.
    async fn boot(&self) -> Result<()> {
        let start = self.start.lock().expect("nobody panics with it").take();
        if let Some(Start { mut gate, _vhost: vhost }) = start {
            drop(vhost);
            gate.write_all(b"\n").map_err(Error::host("start acrn-dm"))?;
        }
        let (socket, pid) = (self.monitor.socket().to_owned(), self.process.pid());
        let made = timeout(START_DEADLINE, spawn_blocking(move || until_exists(&socket, pid))).await;
        let made = made.map_err(|_| {
            self.process.kill();
            let seconds = START_DEADLINE.as_secs();
            Error::Hypervisor(format!("acrn-dm (pid {pid}) did not make its VM within {seconds} s of its start"))
        })?;
        if made.unwrap_or(Ok(false)).map_err(Error::host("wait for acrn-dm's monitor"))? {
            return Ok(());
        }
        let ended = self.process.ended().await;
        // Only a guest's own end is a good one.
        if ended.well() { Ok(()) } else { Err(Error::Hypervisor(self.process.describe(&ended))) }
    }

    /// acrn-dm has no way to ask: its power button is wired to a serial port that needs a program of ACRN's in the guest.
    async fn power_off(&self) -> Result<()> {
        Err(Error::Unsupported("asking a guest to power off is not supported with acrn".into()))
    }

    async fn attach(&self, device: &Device) -> Result<GuestDevice> {
        let Kind::Block(block) = request::kind(device)? else {
            return Err(Error::Unsupported(format!(
                "attaching a {} device is not supported with acrn: it takes block devices",
                request::kind_name(request::kind(device)?)
            )));
        };
        if self.start.lock().expect("nobody panics with it").is_some() {
            return Err(Error::WrongState { verb: "attach a device to", state: "created but not booted" });
        }
        let disk = command_line::disk(block)?;
        monitor::check(&disk)?;
        let taken = self.empty_disks.lock().expect("nobody panics with it").pop();
        let slot = taken.ok_or_else(|| {
            Error::Unsupported("the guest has no empty disk left: raise disk_slots in [hypervisor.acrn]".into())
        })?;
        if !self.monitor.fill_disk(slot, &disk).await? {
            self.empty_disks.lock().expect("nobody panics with it").push(slot);
            return Err(Error::Hypervisor(format!(
                "acrn-dm refused the disk {} for its slot {slot}: it takes block devices and files of whole sectors of 512 bytes",
                block.path
            )));
        }
        Ok(GuestDevice { id: device.id.clone(), address: command_line::address(slot), ..Default::default() })
    }

    fn kill(&self) {
        // The hypervisor takes the guest down when its device is closed.
        self.process.kill();
    }

    async fn ended(&self) -> WaitResponse {
        let ended = self.process.ended().await;
        self.monitor.remove();
        drop(self.terminal.lock().expect("nobody panics with it").take());
        self.console.drained().await;
        let (reason, detail) = match self.console.panic() {
            Some(words) => (ExitReason::GUEST_PANIC, format!("the guest kernel panicked: {words}")),
            None if ended.well() => (ExitReason::GUEST_SHUTDOWN, "the guest ended itself".to_owned()),
            None => (ExitReason::HYPERVISOR_FAILED, self.process.describe(&ended)),
        };
        WaitResponse { console_tail: self.console.tail(), ..exit(reason, detail) }
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn console(&self) -> &Console {
        &self.console
    }
}

/// Unique on the host and within acrn-dm's 15 characters.
fn name() -> String {
    format!("caisson{}", std::process::id())
}

/// Adds one device, and answers where the guest finds it.
fn add(device: &Device, run_dir: &Path, line: &mut CommandLine, vhost: &mut Option<OwnedFd>) -> Result<String> {
    match request::kind(device)? {
        Kind::Block(block) => line.block(block),
        Kind::Net(net) => line.net(&device.id, net).map(|()| String::new()),
        Kind::Vsock(vsock) => match GuestVsock::open(Path::new(&vsock.socket), run_dir, &Lifetime::of_launcher())? {
            GuestVsock::Kernel { vhost: held, cid } => {
                *vhost = Some(held);
                line.vsock(cid).map(|()| format!("vsock:{cid}"))
            }
            GuestVsock::Hybrid { .. } => Err(Error::Unsupported(
                "a guest of ACRN needs the kernel's vsock: load the module vhost_vsock, so that there is a /dev/vhost-vsock"
                    .into(),
            )),
        },
        Kind::Rng(rng) => line.rng(rng).map(|()| String::new()),
        // The first serial port, which every guest has.
        Kind::Console(_) => Ok(String::new()),
        other => Err(Error::Unsupported(format!("a {} device is not supported with acrn", request::kind_name(other)))),
    }
}
