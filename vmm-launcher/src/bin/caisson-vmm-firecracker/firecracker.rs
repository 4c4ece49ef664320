//! One Firecracker process with its VM.

use std::{
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use caisson_protocol::vmm::{
    CapabilitiesResponse, CreateRequest, Device, ExitReason, GuestDevice, ResizeBalloonRequest, ResizeMemoryRequest,
    RestoreRequest, SnapshotRequest, VmConfig, VmState, WaitResponse, device::Kind,
};
use caisson_vmm_launcher::{
    Error, Result,
    ability::never,
    console::{self, Audience, Console},
    hypervisor::{Adopted, Created, Hypervisor},
    jail::{self, Jail},
    kernel::{self, KernelFormat},
    kvm, metrics,
    options::{describe, parse, with_defaults, with_needs},
    outlive::{Lifetime, Memory, connect},
    process::{Ended, Process, Streams, lasting_pipe, reopen},
    request,
    size::{Size, Sizes},
    snapshot,
    vm::exit,
};
use rustix::pipe::fcntl_setpipe_size;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::timeout;
use tracing::{debug, info};

use crate::{
    api::{Api, SnapshotFiles},
    configuration::{self, Configuration, iface},
    disks::{Disks, Spare, Spares},
    layout::{self, API, LOG, METRICS, RunDir, SNAPSHOT},
    log::Log,
    metrics::Counters,
    options::{DOCS, NEEDS, Options},
    probe,
    version::{self, Version, WITH_BZIMAGE},
};

/// Firecracker is ready in some milliseconds, unless the host is very busy.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// `MAX_SUPPORTED_VCPUS`.
const MAX_VCPUS: u32 = 32;
/// What the guest may write while nobody reads it.
const CONSOLE_BYTES: usize = 1 << 18;
/// The console, as Firecracker has it.
const STDOUT: i32 = 1;
/// Firecracker's exit status after a system call that its seccomp filters forbid.
const BAD_SYSCALL: i32 = 148;

/// For `Capabilities`, whatever Firecracker has.
const MISSING: &[(&str, &str)] = &[
    ("fs", "Firecracker has no virtio-fs"),
    ("vfio", "Firecracker passes no devices of the host to guests"),
    ("net-hotplug", "the launcher gives Firecracker's guests only disks while they run"),
    ("resize-vcpus", "Firecracker's vCPUs are fixed"),
    ("tdx", "Firecracker has no confidential guests"),
    ("sev-snp", "Firecracker has no confidential guests"),
];

/// A running Firecracker.
pub struct Firecracker {
    process: Process,
    api: Api,
    console: Console,
    log: Log,
    counters: Counters,
    spares: Spares,
    sizes: Sizes,
    booted: AtomicBool,
    /// What lives as long as Firecracker does.
    held: Mutex<Option<RunDir>>,
    run_dir: PathBuf,
    console_log: Option<PathBuf>,
}

/// What another launcher needs to know, beside Firecracker's process.
#[derive(Debug, Deserialize, Serialize)]
struct Own {
    run_dir: PathBuf,
    disks: Disks,
    sizes: Sizes,
}

impl Hypervisor for Firecracker {
    const NAME: &'static str = "firecracker";
    const DEFAULT_PATH: &'static str = "/usr/bin/firecracker";

    const HUGE_PAGES: Result<(), &'static str> = Ok(());
    const OUTLIVES_LAUNCHER: Result<(), &'static str> = Ok(());

    fn options() -> Value {
        with_defaults(with_needs(describe::<Options>(DOCS), NEEDS), &[("shared_fs", "none".into())])
    }

    async fn capabilities(path: &Path, _options: &str) -> Result<CapabilitiesResponse> {
        let version = version::of(path).await?;
        let mut able = probe::ask(path, &version).await?;
        never(MISSING, &mut able);
        match kvm::probe_aside().await {
            Ok(()) => (able.accelerator, able.accelerator_reason) = ("kvm".into(), "/dev/kvm runs guests".into()),
            Err(why) => able.accelerator_reason = format!("Firecracker needs KVM: {why}"),
        }
        Ok(able)
    }

    async fn create(request: &CreateRequest, audience: Audience) -> Result<Created<Self>> {
        let vm = request::check(request, MAX_VCPUS)?;
        let options: Options = parse(&request.options)?;
        options.block_device_driver.check(options.bus())?;
        let run_dir = Path::new(&request.run_dir);
        let configuration = Configuration::of(vm, &options, run_dir)?;
        let format = kernel::format(Path::new(&vm.kernel))?;
        let firecracker = start(request, vm, &options, audience, Jail::default(), configuration.spares).await?;
        let configured = async {
            check_kernel(&vm.kernel, format, &firecracker.api).await?;
            firecracker.api.configure(&configuration.calls).await
        };
        let configured = configured.await;
        firecracker.made(configured, configuration.devices).await
    }

    async fn restore(request: &RestoreRequest, audience: Audience) -> Result<Created<Self>> {
        let as_new = CreateRequest {
            run_dir: request.run_dir.clone(),
            vm: request.vm.clone(),
            options: request.options.clone(),
            ..Default::default()
        };
        let vm = request::check(&as_new, MAX_VCPUS)?;
        let options: Options = parse(&request.options)?;
        let run_dir = Path::new(&request.run_dir);
        let configuration = Configuration::of(vm, &options, run_dir)?;
        let mut jail = Jail::default();
        jail.show(&request.directory, SNAPSHOT, false);
        let firecracker = start(&as_new, vm, &options, audience, jail, configuration.spares).await?;
        let loaded = async {
            firecracker.api.load_snapshot(&snapshot_files(), &taps(vm)).await?;
            // It may be saved again, there.
            jail::hide(firecracker.process.pid(), Path::new(SNAPSHOT)).await
        };
        let loaded = loaded.await;
        firecracker.booted.store(true, Ordering::Relaxed);
        firecracker.made(loaded, configuration.devices).await
    }

    async fn boot(&self) -> Result<()> {
        self.explained(self.api.start().await).await?;
        self.booted.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn power_off(&self) -> Result<()> {
        self.api.press_ctrl_alt_del().await
    }

    async fn pause(&self) -> Result<()> {
        self.explained(self.api.pause().await).await
    }

    async fn resume(&self) -> Result<()> {
        self.explained(self.api.resume().await).await
    }

    async fn attach(&self, device: &Device) -> Result<GuestDevice> {
        match request::kind(device)? {
            Kind::Block(block) => {
                if !self.booted.load(Ordering::Relaxed) {
                    return Err(Error::Invalid("Firecracker takes no disks between its creation and its boot".into()));
                }
                let attached = self.spares.attach(&device.id, block, self.process.pid(), &self.api).await;
                self.explained(attached).await?;
                Ok(GuestDevice { id: device.id.clone(), address: configuration::serial(block)?, ..Default::default() })
            }
            other => {
                let kind = request::kind_name(other);
                Err(Error::Unsupported(format!("attaching a {kind} device is not supported with firecracker")))
            }
        }
    }

    async fn detach(&self, id: &str) -> Result<()> {
        self.explained(self.spares.detach(id, self.process.pid(), &self.api).await).await
    }

    async fn snapshot(&self, request: &SnapshotRequest) -> Result<()> {
        snapshot::check(self.api.state().await?, &request.directory)?;
        if self.spares.any_attached() {
            return Err(Error::Invalid("detach every disk that was attached before you make a snapshot".into()));
        }
        if self.api.has_huge_pages().await? {
            return Err(Error::Unsupported(
                "a VM of huge pages cannot be saved: Firecracker loads no snapshot of one; make it without huge pages"
                    .into(),
            ));
        }
        let pid = self.process.pid();
        jail::show(pid, Path::new(&request.directory), Path::new(SNAPSHOT), true).await?;
        let made = self.explained(self.api.create_snapshot(&snapshot_files()).await).await;
        let hidden = jail::hide(pid, Path::new(SNAPSHOT)).await;
        made.and(hidden)
    }

    /// It does not tell when the guest has come so far: the answer is how far it is now.
    async fn resize_memory(&self, request: &ResizeMemoryRequest) -> Result<u64> {
        let sizes = self.sizes;
        sizes.can_have_memory(request.memory_mib)?;
        if can_grow(&sizes) {
            let added_mib = request.memory_mib - sizes.first.memory_mib;
            self.explained(self.api.request_memory(added_mib).await).await?;
        }
        self.memory_mib().await
    }

    /// As [`Self::resize_memory`].
    async fn resize_balloon(&self, request: &ResizeBalloonRequest) -> Result<u64> {
        self.sizes.can_give(request.memory_mib)?;
        self.explained(self.api.resize_balloon(request.memory_mib).await).await?;
        self.api.balloon_mib().await
    }

    fn kill(&self) {
        self.process.kill();
    }

    async fn ended(&self) -> WaitResponse {
        let ended = self.process.ended().await;
        // The rest of the console is heard when nobody holds its other end.
        drop(self.held.lock().expect("nobody panics with the files").take());
        self.console.drained().await;
        let (reason, detail) = self.explain(&ended);
        WaitResponse { console_tail: self.console.tail(), ..exit(reason, detail) }
    }

    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn console(&self) -> &Console {
        &self.console
    }

    fn remember(&self) -> Result<Memory> {
        let own = Own { run_dir: self.run_dir.clone(), disks: self.spares.disks(), sizes: self.sizes };
        Ok(Memory {
            process: self.process.known(),
            console_log: self.console_log.clone(),
            own: serde_json::to_value(own).expect("paths of requests are UTF-8"),
        })
    }

    async fn adopt(_: &Path, memory: Memory) -> Result<Adopted<Self>> {
        let own: Own = memory.own()?;
        let process = Process::adopt(&memory.process)?;
        let files = RunDir::adopt(&own.run_dir);
        let (log, counters) = (Log::read(&files.path(LOG))?, Counters::read(&files.path(METRICS))?);
        let output = reopen(process.pid(), STDOUT).map_err(Error::host("listen to the guest's console"))?;
        let console = Console::adopt_pipe(output, memory.console_log.as_deref())?;
        let api = Api::over(connect(&memory.process, &files.path(API)).await?).await?;
        let state = api.state().await?;
        let hypervisor = Self {
            process,
            api,
            console,
            log,
            counters,
            spares: Spares::adopt(own.disks),
            sizes: own.sizes,
            booted: AtomicBool::new(state != VmState::CREATED),
            held: Mutex::new(Some(files)),
            run_dir: own.run_dir,
            console_log: memory.console_log,
        };
        Ok(Adopted { hypervisor, state })
    }

    async fn metrics(&self) -> Result<String> {
        let mut known = metrics::Metrics::default();
        known.size(Size { memory_mib: self.memory_mib().await?, ..self.sizes.first });
        let counted = match self.booted.load(Ordering::Relaxed) {
            true => self.counters.text(&self.api).await?,
            false => String::new(),
        };
        Ok(known.text() + &counted)
    }
}

/// Starts Firecracker in `jail` until its API answers. When this fails or is given up, Firecracker has ended.
async fn start(
    request: &CreateRequest,
    vm: &VmConfig,
    options: &Options,
    audience: Audience,
    mut jail: Jail,
    spares: Vec<Spare>,
) -> Result<Firecracker> {
    let started = Instant::now();
    let run_dir = Path::new(&request.run_dir);
    kvm::require("Firecracker").await?;
    let files = RunDir::prepare(run_dir)?;
    let (log, counters) = (Log::read(&files.path(LOG))?, Counters::read(&files.path(METRICS))?);
    let lifetime = Lifetime::of(request)?;
    jail.let_live(&lifetime);
    let console_log = console::log_of(&vm.devices);
    // Another launcher finds it by Firecracker's own descriptor.
    let (near, output) = lasting_pipe().map_err(Error::host("make a pipe for the console"))?;
    // Firecracker loses what does not fit. A smaller one is no reason to have no VM.
    let _ = fcntl_setpipe_size(&output, CONSOLE_BYTES);
    let (console, stdin) = Console::over_pipe(near, console_log, audience)?;
    configuration::show(vm, run_dir, &mut jail);
    let mut arguments = vec!["--api-sock".into(), layout::in_run(API), "--log-path".into(), layout::in_run(LOG)];
    arguments.extend(["--metrics-path".into(), layout::in_run(METRICS)]);
    if options.pci {
        arguments.push("--enable-pci".into());
    }
    arguments.extend(options.extra_args.iter().cloned());

    debug!(?arguments, "starting Firecracker");
    let program = Path::new(&vm.hypervisor_path);
    let process = jail.start(program, &arguments, Vec::new(), Streams { stdin, stdout: output.into() })?;
    let socket = files.path(API);
    let connected = tokio::select! {
        // What ended explains why nothing listens.
        biased;
        ended = process.ended() => {
            let ended = describe_end(&process, &ended, &log);
            return Err(Error::Hypervisor(format!("Firecracker did not start: {ended}")));
        }
        connected = timeout(START_DEADLINE, log.connect(&socket)) => connected,
    };
    let stream = connected.map_err(|_| {
        let (pid, seconds) = (process.pid(), START_DEADLINE.as_secs());
        Error::Hypervisor(format!("Firecracker (pid {pid}) did not answer within {seconds} s of its start"))
    })??;
    let api = Api::over(stream).await?;
    // From here on only what goes wrong is of interest.
    api.log_warnings_only().await?;
    log.forget();
    info!(start = ?started.elapsed(), "Firecracker started");
    Ok(Firecracker {
        process,
        api,
        console,
        log,
        counters,
        spares: Spares::new(spares, vm.devices.iter().map(|device| device.id.clone()).collect()),
        sizes: Sizes::of(vm),
        booted: AtomicBool::new(false),
        held: Mutex::new(Some(files)),
        run_dir: run_dir.to_owned(),
        console_log: console_log.map(Path::to_owned),
    })
}

impl Firecracker {
    /// Itself when it is as it should be; else it ends first.
    async fn made(self, done: Result<()>, devices: Vec<GuestDevice>) -> Result<Created<Self>> {
        match self.explained(done).await {
            Ok(()) => Ok(Created { hypervisor: self, devices }),
            Err(refusal) => {
                self.process.kill();
                self.process.ended().await;
                Err(refusal)
            }
        }
    }

    /// `done`, and Firecracker's last words when it has ended instead.
    async fn explained<T>(&self, done: Result<T>) -> Result<T> {
        match done {
            Err(refusal) => Err(self.process.last_words(refusal, |ended| self.describe(ended)).await),
            done => done,
        }
    }

    /// What the guest has, as far as it has taken it.
    async fn memory_mib(&self) -> Result<u64> {
        let added = match can_grow(&self.sizes) && self.booted.load(Ordering::Relaxed) {
            true => self.api.added_memory_mib().await?,
            false => 0,
        };
        Ok(self.sizes.first.memory_mib + added)
    }

    fn explain(&self, ended: &Ended) -> (ExitReason, String) {
        if let Some(words) = self.console.panic() {
            return (ExitReason::GUEST_PANIC, format!("the guest kernel panicked: {words}"));
        }
        if ended.well() {
            return (ExitReason::GUEST_SHUTDOWN, "the guest rebooted, which ends its VM".into());
        }
        (ExitReason::HYPERVISOR_FAILED, self.describe(ended))
    }

    fn describe(&self, ended: &Ended) -> String {
        describe_end(&self.process, ended, &self.log)
    }
}

fn can_grow(sizes: &Sizes) -> bool {
    sizes.most.memory_mib > sizes.first.memory_mib
}

/// With the end of Firecracker's log, which has what its standard error has not.
fn describe_end(process: &Process, ended: &Ended, log: &Log) -> String {
    let mut words = process.describe(ended);
    if ended.status.and_then(|status| status.code()) == Some(BAD_SYSCALL) {
        words.push_str(" (a system call that its seccomp filters forbid)");
    }
    let log = log.text();
    if !log.is_empty() {
        words.push_str(": ");
        words.push_str(&log);
    }
    words
}

/// # Errors
/// When this Firecracker cannot boot a `kernel` of this format.
async fn check_kernel(kernel: &str, format: KernelFormat, api: &Api) -> Result<()> {
    if format == KernelFormat::Elf {
        return Ok(());
    }
    let word = api.version().await?;
    if Version::parse(&word).is_some_and(|version| version >= WITH_BZIMAGE) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "the guest kernel {kernel} is a bzImage, which Firecracker {word} cannot boot: give it an ELF vmlinux, or use \
         Firecracker {WITH_BZIMAGE} or newer"
    )))
}

fn snapshot_files() -> SnapshotFiles {
    SnapshotFiles { state: format!("{SNAPSHOT}/state"), memory: format!("{SNAPSHOT}/memory") }
}

/// The disks and the vsock of a snapshot are where they were; the taps may be others.
fn taps(vm: &VmConfig) -> Vec<(String, String)> {
    let taps = vm.devices.iter().filter_map(|device| match &device.kind {
        Some(Kind::Net(net)) => Some((iface(&device.id), net.tap.clone())),
        _ => None,
    });
    taps.collect()
}
