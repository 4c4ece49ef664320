//! One QEMU process with its VM.

mod adoption;
pub mod status;

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use caisson_protocol::{
    status::sentence,
    vmm::{
        Block, CapabilitiesResponse, CreateRequest, Device, ExitReason, GuestDevice, ResizeBalloonRequest,
        ResizeMemoryRequest, ResizeVcpusRequest, RestoreRequest, SnapshotRequest, VmConfig, WaitResponse, device::Kind,
    },
};
use caisson_vmm_launcher::{
    Error, Result,
    console::{self, Audience, Console},
    guest_vsock::GuestVsock,
    hypervisor::{Adopted, Created, Hypervisor},
    kernel, metrics,
    options::{describe, parse, with_needs},
    outlive::{Lifetime, Memory},
    process::{Ended, Process, Streams},
    qmp::Qmp,
    request, snapshot,
    sockets::Sockets,
    time_stamp::Moment,
    vfio::HostDevice,
    virtiofsd::{Virtiofsd, named_listener},
    vm::exit,
};
use serde_json::json;
use tokio::{net::UnixStream, time::timeout};
use tracing::{debug, info};

use crate::{
    abilities,
    accelerator::{self, Accelerator},
    card::Card,
    command_line::{CommandLine, Socket},
    helpers::{Helpers, KnownHelpers},
    hotplug::Slots,
    kernel_params::kernel_params,
    options::{DOCS, NEEDS, Options},
    probe::Installed,
    saved::{self, Saved},
    sizes::Sizes,
};

/// QEMU is ready in a tenth of a second, unless the host is very busy.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// It reads all of the guest's memory first.
const RESTORE_DEADLINE: Duration = Duration::from_secs(150);
/// How much later a helper's end may be heard of than that of the QEMU that ended by it.
const HELPER_BEFORE_QEMU: Duration = Duration::from_millis(100);
/// How much later than its connection QEMU may end.
const QEMU_AFTER_QMP: Duration = Duration::from_secs(1);
/// One local interrupt controller each, without x2APIC.
const MAX_VCPUS: u32 = 255;
/// The image is the first disk.
const IMAGE_ID: &str = "image";

/// A running QEMU.
pub struct Qemu {
    process: Process,
    qmp: Qmp,
    console: Console,
    helpers: Mutex<Helpers>,
    slots: Slots,
    sizes: Sizes,
    run_dir: PathBuf,
    /// A device that keeps the VM from being saved.
    unsaveable: Option<String>,
    known: KnownHelpers,
    console_log: Option<PathBuf>,
}

impl Hypervisor for Qemu {
    const NAME: &'static str = "qemu";
    const DEFAULT_PATH: &'static str = "/usr/bin/qemu-system-x86_64";

    const HUGE_PAGES: Result<(), &'static str> = Ok(());
    const OUTLIVES_LAUNCHER: Result<(), &'static str> = Ok(());

    fn options() -> serde_json::Value {
        with_needs(describe::<Options>(DOCS), NEEDS)
    }

    async fn capabilities(path: &Path, options: &str) -> Result<CapabilitiesResponse> {
        let options: Options = parse(options)?;
        let installed = Installed::find(path).await?;
        let (accelerator, why) = accelerator::choose(options.accel).await?;
        let mut able = CapabilitiesResponse {
            version: installed.version.clone(),
            accelerator: accelerator.name().into(),
            accelerator_reason: why,
            ..Default::default()
        };
        abilities::tell(&installed, options.machine_type, &mut able);
        Ok(able)
    }

    async fn create(request: &CreateRequest, audience: Audience) -> Result<Created<Self>> {
        start(request, audience, None).await
    }

    async fn restore(request: &RestoreRequest, audience: Audience) -> Result<Created<Self>> {
        let saved = Saved::open(Path::new(&request.directory))?;
        let create = CreateRequest {
            run_dir: request.run_dir.clone(),
            vm: request.vm.clone(),
            options: request.options.clone(),
            ..Default::default()
        };
        start(&create, audience, Some(saved)).await
    }

    async fn boot(&self) -> Result<()> {
        self.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn power_off(&self) -> Result<()> {
        self.qmp.execute("system_powerdown", json!({})).await.map(drop)
    }

    async fn pause(&self) -> Result<()> {
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

    async fn snapshot(&self, request: &SnapshotRequest) -> Result<()> {
        if let Some(why) = &self.unsaveable {
            return Err(Error::Unsupported(why.clone()));
        }
        if !self.slots.are_empty() || !self.sizes.are_the_first() {
            return Err(Error::Invalid(
                "a VM is restored as it was made: detach what was attached and undo what was resized before a snapshot"
                    .into(),
            ));
        }
        snapshot::check(status::state(&self.qmp).await?, &request.directory)?;
        saved::save(Path::new(&request.directory), &self.run_dir, &self.qmp).await
    }

    async fn resize_vcpus(&self, request: &ResizeVcpusRequest) -> Result<u32> {
        self.sizes.resize_vcpus(request.vcpus, &self.qmp).await
    }

    async fn resize_memory(&self, request: &ResizeMemoryRequest) -> Result<u64> {
        self.sizes.resize_memory(request.memory_mib, &self.qmp).await
    }

    async fn resize_balloon(&self, request: &ResizeBalloonRequest) -> Result<u64> {
        self.sizes.resize_balloon(request, &self.qmp).await
    }

    fn kill(&self) {
        self.process.kill();
    }

    async fn ended(&self) -> WaitResponse {
        let helpers = std::mem::take(&mut *self.helpers.lock().expect("nobody panics with the helpers"));
        let (ended, failure) = tokio::select! {
            ended = self.process.ended_with(helpers.failed()) => ended,
            why = status::stopped_by_itself(&self.qmp) => {
                let ended = killed(&self.process).await;
                let failure = ended.with_last_words(why);
                (ended, Some(failure))
            }
        };
        self.console.drained().await;
        helpers.end().await;
        let (reason, detail) = match failure {
            Some(failure) => (ExitReason::HYPERVISOR_FAILED, failure),
            None => self.explain(&ended),
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
        adoption::remember(self)
    }

    async fn adopt(state_dir: &Path, memory: Memory) -> Result<Adopted<Self>> {
        adoption::adopt(state_dir, memory).await
    }

    async fn metrics(&self) -> Result<String> {
        let mut metrics = metrics::Metrics::default();
        metrics.size(self.sizes.now());
        Ok(metrics.text())
    }
}

/// Starts QEMU with a new VM, or with a saved one, and everything that it needs. When this fails all of it has ended.
async fn start(request: &CreateRequest, audience: Audience, saved: Option<Saved>) -> Result<Created<Qemu>> {
    let mut helpers = Helpers::default();
    match start_with(request, audience, saved, &mut helpers).await {
        Ok(created) => {
            *created.hypervisor.helpers.lock().expect("nobody panics with the helpers") = helpers;
            Ok(created)
        }
        Err(error) => {
            helpers.end().await;
            Err(error)
        }
    }
}

/// When this fails QEMU has ended; `helpers` are left to the caller.
async fn start_with(
    request: &CreateRequest,
    audience: Audience,
    saved: Option<Saved>,
    helpers: &mut Helpers,
) -> Result<Created<Qemu>> {
    let (clock, started) = (Moment::now(), Instant::now());
    let vm = request::check(request, MAX_VCPUS)?;
    let options = parse::<Options>(&request.options)?.for_vm(vm)?;
    options.block_device_driver.check(options.machine_type.bus())?;
    kernel::format(Path::new(&vm.kernel))?;
    let (accelerator, why) = accelerator::choose(options.accel).await?;
    info!(accelerator = accelerator.name(), why, machine_type = ?options.machine_type, "accelerator chosen");

    let shared_memory = vm.devices.iter().any(|device| matches!(device.kind, Some(Kind::Fs(_) | Kind::Vsock(_))));
    let mut line = CommandLine::new(vm, &options, accelerator, shared_memory);
    let (lifetime, console_log) = (Lifetime::of(request)?, console::log_of(&vm.devices));
    let (qmp, console) = match lifetime.is_longer() {
        true => {
            let [protocol, serial] = adoption::sockets(Path::new(&request.state_dir));
            helpers.sockets = Sockets(vec![protocol.clone(), serial.clone()]);
            let (listener, connection) = named_listener(&protocol)?;
            line.monitor(Socket::Listening(listener.into()));
            let qmp = Qmp::over("QEMU", ours(connection)?);
            let (listener, connection) = named_listener(&serial)?;
            line.console(Socket::Listening(listener.into()));
            (qmp, Console::over(ours(connection)?, console_log, audience)?)
        }
        false => {
            let (qmp, socket) = Qmp::pair("QEMU").map_err(Error::host("make QEMU's socket pair"))?;
            line.monitor(Socket::Connected(socket));
            let (console, socket) = Console::open(console_log, audience)?;
            line.console(Socket::Connected(socket));
            (qmp, console)
        }
    };
    if !vm.image.is_empty() {
        line.block(IMAGE_ID, &Block { path: vm.image.clone(), read_only: true, ..Default::default() });
    }
    let mut devices = Vec::with_capacity(vm.devices.len());
    for device in &vm.devices {
        let address = add(device, accelerator, Path::new(&request.run_dir), &lifetime, &mut line, helpers)?;
        devices.push(GuestDevice { id: device.id.clone(), address, ..Default::default() });
    }
    let incoming = saved.map(|saved| line.incoming(saved));
    // As late as can be: the clock is known the better the longer it was watched.
    let tsc_khz = (accelerator == Accelerator::Tcg).then(|| clock.khz());
    line.kernel(vm, kernel_params(vm, tsc_khz));
    line.arguments.extend(options.extra_args.iter().cloned());

    debug!(arguments = ?line.arguments, "starting QEMU");
    let spawned = Instant::now();
    let program = Path::new(&vm.hypervisor_path);
    let process = Process::start_with(program, &line.arguments, line.descriptors, Streams::none(), &lifetime)?;
    if let Err(error) = ready(&process, &qmp, incoming.as_deref(), helpers).await {
        killed(&process).await;
        return Err(error);
    }
    info!(prepare = ?spawned - started, start = ?spawned.elapsed(), "QEMU started");
    let hypervisor = Qemu {
        process,
        qmp,
        console,
        helpers: Mutex::default(),
        slots: Slots::new(options.machine_type, options.hotplug_slots),
        sizes: Sizes::of(vm, options.machine_type),
        run_dir: request.run_dir.clone().into(),
        unsaveable: unsaveable(vm, helpers.vsock.is_some()),
        known: helpers.known(&lifetime)?,
        console_log: console_log.map(Path::to_owned),
    };
    Ok(Created { hypervisor, devices })
}

/// Why `vm`, which may have our own vsock device, cannot be saved.
fn unsaveable(vm: &VmConfig, has_hybrid_vsock: bool) -> Option<String> {
    if has_hybrid_vsock {
        return Some(
            "a VM with hybrid vsock cannot be saved: the launcher's vsock device keeps no record of the memory that it \
             writes, which QEMU needs; load the module vhost_vsock, so that there is a /dev/vhost-vsock"
                .into(),
        );
    }
    vm.devices.iter().find_map(|device| match device.kind {
        Some(Kind::Fs(_)) => Some(format!(
            "a VM that shares a folder cannot be saved: QEMU does not save what virtiofsd knows of \"{}\"",
            device.id
        )),
        Some(Kind::Pmem(_)) => Some(format!(
            "a VM with a pmem image cannot be saved: when it is restored, QEMU would write the image of \"{}\" as it was",
            device.id
        )),
        _ => None,
    })
}

/// Waits until QEMU answers; whatever ends before is the reason why it does not.
async fn ready(process: &Process, qmp: &Qmp, incoming: Option<&str>, helpers: &Helpers) -> Result<()> {
    let answers = async {
        qmp.negotiate().await?;
        match incoming {
            Some(uri) => saved::load(uri, qmp).await,
            None => Ok(()),
        }
    };
    let ready = async {
        tokio::select! {
            // A helper that died explains a QEMU that died of it.
            biased;
            helper = helpers.failed() => Err(Error::Hypervisor(helper)),
            ended = process.ended() => Err(did_not_start(process, &ended, helpers).await),
            ready = answers => match ready {
                Ok(()) => Ok(()),
                // QEMU greets before it makes its machine; when that fails, its connection ends before it does.
                Err(error) => match timeout(QEMU_AFTER_QMP, process.ended()).await {
                    Ok(ended) => Err(did_not_start(process, &ended, helpers).await),
                    Err(_) => Err(hangs(process, sentence(&error)).await),
                }
            }
        }
    };
    let deadline = if incoming.is_some() { RESTORE_DEADLINE } else { START_DEADLINE };
    match timeout(deadline, ready).await {
        Ok(ready) => ready,
        Err(_) => {
            let (pid, seconds) = (process.pid(), deadline.as_secs());
            Err(hangs(process, format!("QEMU (pid {pid}) did not answer within {seconds} s of its start")).await)
        }
    }
}

/// Ends QEMU, which may have said more than the `words` about it.
async fn hangs(process: &Process, words: String) -> Error {
    Error::Hypervisor(killed(process).await.with_last_words(words))
}

async fn killed(process: &Process) -> Ended {
    process.kill();
    process.ended().await
}

async fn did_not_start(process: &Process, ended: &Ended, helpers: &Helpers) -> Error {
    // QEMU notices a helper's end by its socket, which closes before the helper has quite ended.
    let helper = timeout(HELPER_BEFORE_QEMU, helpers.failed()).await;
    Error::Hypervisor(helper.unwrap_or_else(|_| format!("QEMU did not start: {}", process.describe(ended))))
}

/// Our end of a connection that waits for QEMU.
fn ours(connection: OwnedFd) -> Result<UnixStream> {
    let connection = StdUnixStream::from(connection);
    let stream = connection.set_nonblocking(true).and_then(|()| UnixStream::from_std(connection));
    stream.map_err(Error::host("use a socket of this program itself"))
}

impl Qemu {
    fn explain(&self, ended: &Ended) -> (ExitReason, String) {
        let reason = self.qmp.shutdown_reason();
        let reason = reason.as_deref().unwrap_or_default();
        if let Some(words) = self.console.panic() {
            return (ExitReason::GUEST_PANIC, format!("the guest kernel panicked: {words}"));
        }
        if ended.well() && reason != "host-signal" {
            let how = if reason == "guest-reset" { "rebooted, which ends its VM" } else { "powered off" };
            return (ExitReason::GUEST_SHUTDOWN, format!("the guest {how}"));
        }
        (ExitReason::HYPERVISOR_FAILED, self.process.describe(ended))
    }
}

/// Adds one device, and answers where the guest finds it.
fn add(
    device: &Device,
    accelerator: Accelerator,
    run_dir: &Path,
    lifetime: &Lifetime,
    line: &mut CommandLine,
    helpers: &mut Helpers,
) -> Result<String> {
    let id = device.id.as_str();
    let kind = request::kind(device)?;
    match kind {
        Kind::Block(block) => {
            line.block(id, block);
            Ok(format!("serial:{id}"))
        }
        Kind::Net(net) => {
            line.net(id, net, Card::open(net, accelerator)?);
            Ok(String::new())
        }
        Kind::Vsock(vsock) => {
            let vsock_device = GuestVsock::open(Path::new(&vsock.socket), run_dir, lifetime)?;
            let address = match &vsock_device {
                GuestVsock::Kernel { cid, .. } => format!("vsock:{cid}"),
                GuestVsock::Hybrid { .. } => format!("hvsock:{}", vsock.socket),
            };
            helpers.vsock = line.vsock(id, vsock_device);
            Ok(address)
        }
        Kind::Fs(fs) => {
            let (file_server, connection) = Virtiofsd::start(fs, run_dir, lifetime)?;
            helpers.file_servers.add(file_server);
            line.fs(id, &fs.tag, connection);
            Ok(format!("tag:{}", fs.tag))
        }
        Kind::Balloon(balloon) => {
            line.balloon(id, balloon);
            Ok(String::new())
        }
        Kind::Rng(rng) => {
            line.rng(id, &rng.source);
            Ok(String::new())
        }
        Kind::Pmem(pmem) => {
            line.pmem(id, pmem)?;
            Ok(String::new())
        }
        Kind::Vfio(vfio) => {
            line.vfio(id, &vfio.address)?;
            HostDevice::find(&vfio.address)?;
            Ok(String::new())
        }
        // The first serial port, which every guest has.
        Kind::Console(_) => Ok(String::new()),
        other => {
            Err(Error::Unsupported(format!("a {} device is not supported with QEMU yet", request::kind_name(other))))
        }
    }
}

#[cfg(test)]
mod tests;
