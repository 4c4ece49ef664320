//! One acrn-dm process with its guest.

use std::{
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::Mutex,
};

use caisson_protocol::vmm::{
    CapabilitiesResponse, CreateRequest, Device, ExitReason, GuestDevice, WaitResponse, device::Kind,
};
use caisson_vmm_launcher::{
    Error, Result,
    ability::never,
    block_driver::Bus,
    console::{Audience, Console},
    guest_vsock::GuestVsock,
    hypervisor::{Created, Hypervisor},
    kernel,
    options::{describe, parse, with_defaults},
    outlive::Lifetime,
    process::Process,
    request,
    vm::exit,
};
use tracing::{debug, info};

use crate::{
    command_line::{self, CommandLine},
    monitor::Monitor,
    options::{DOCS, Options},
    probe,
    pty::Pty,
};

/// `CONFIG_MAX_VM_NUM` and the scenario decide in the end.
const MAX_VCPUS: u32 = 64;
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
        let log = vm.devices.iter().find_map(|device| match &device.kind {
            Some(Kind::Console(console)) => Some(Path::new(console.log.as_str())),
            _ => None,
        });
        let (console, socket) = Console::open(log, audience)?;
        let terminal = Pty::open(socket).map_err(Error::host("make a terminal for the guest's console"))?;
        let monitor = Monitor { socket: Path::new(&request.run_dir).join("acrn-dm.sock") };
        let mut line = CommandLine::new(vm, &options, terminal.path(), &monitor.socket)?;
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
        let mut empty_disks = (0..options.disk_slots).map(|_| line.empty_disk()).collect::<Result<Vec<_>>>()?;
        empty_disks.reverse();
        let arguments = line.finish(&options, name());

        debug!(?arguments, "starting acrn-dm");
        let (wait, gate) = std::io::pipe().map_err(Error::host("make a pipe"))?;
        let wait = OwnedFd::from(wait);
        let mut shell =
            vec!["-c".to_owned(), GATE.to_owned(), wait.as_raw_fd().to_string(), vm.hypervisor_path.clone()];
        shell.extend(arguments);
        let process = Process::start(Path::new("/bin/sh"), &shell, vec![wait])?;
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

    async fn boot(&self) -> Result<()> {
        let start = self.start.lock().expect("nobody panics with it").take();
        let Some(Start { mut gate, _vhost: vhost }) = start else { return Ok(()) };
        drop(vhost);
        gate.write_all(b"\n").map_err(Error::host("start acrn-dm"))
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
        let path = command_line::plain("disk", &block.path)?;
        let taken = self.empty_disks.lock().expect("nobody panics with it").pop();
        let slot = taken.ok_or_else(|| {
            Error::Unsupported("the guest has no empty disk left: raise disk_slots in [hypervisor.acrn]".into())
        })?;
        let read_only = if block.read_only { ",ro" } else { "" };
        if let Err(error) = self.monitor.fill_disk(slot, &format!("{path}{read_only}")).await {
            self.empty_disks.lock().expect("nobody panics with it").push(slot);
            return Err(error);
        }
        Ok(GuestDevice { id: device.id.clone(), address: command_line::address(slot), ..Default::default() })
    }

    fn kill(&self) {
        // The hypervisor takes the guest down when its device is closed.
        self.process.kill();
    }

    async fn ended(&self) -> WaitResponse {
        let ended = self.process.ended().await;
        drop(self.terminal.lock().expect("nobody panics with it").take());
        self.console.drained().await;
        let (reason, detail) = match self.console.panic() {
            Some(words) => (ExitReason::GUEST_PANIC, format!("the guest kernel panicked: {words}")),
            None if ended.well() => (ExitReason::GUEST_SHUTDOWN, "the guest powered off".to_owned()),
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
        Kind::Net(net) => line.net(net).map(|()| String::new()),
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
        Kind::Rng(_) => line.rng().map(|()| String::new()),
        // The first serial port, which every guest has.
        Kind::Console(_) => Ok(String::new()),
        other => Err(Error::Unsupported(format!("a {} device is not supported with acrn", request::kind_name(other)))),
    }
}
