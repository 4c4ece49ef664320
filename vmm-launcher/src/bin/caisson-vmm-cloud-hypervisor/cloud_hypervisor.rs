//! One Cloud Hypervisor process with its VM.

use std::{
    collections::HashMap,
    fs,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
    time::Instant,
};

use caisson_protocol::vmm::{
    CapabilitiesResponse, CreateRequest, Device, ExitReason, GuestDevice, ResizeBalloonRequest, ResizeMemoryRequest,
    ResizeVcpusRequest, RestoreRequest, SnapshotRequest, VmConfig, VmState, WaitResponse, device::Kind,
};
use caisson_vmm_launcher::{
    Error, Result,
    ability::never,
    block_driver::Bus,
    console::{self, Audience, Console},
    hypervisor::{Adopted, Created, Hypervisor},
    jail::{self, Jail},
    kernel, kvm, metrics,
    options::{describe, parse},
    outlive::{Lifetime, Memory, connect},
    process::{Ended, Process, Streams},
    request,
    size::{Size, Sizes},
    snapshot,
    virtiofsd::{FileServers, KnownFileServers, Virtiofsd, connected_listener, named_listener},
    vm::exit,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::UnixStream;
use tracing::{debug, info};

use crate::{
    api::Api,
    configuration::{self, Configuration},
    events::Events,
    hotplug::{Attached, Host, KnownHostSide},
    layout::{API, NO_TUN, RunDir, SERIAL, SNAPSHOT},
    options::{DOCS, Landlock, Options},
    probe,
};

/// `MAX_SUPPORTED_CPUS_LEGACY`, what local interrupt controllers without x2APIC can have.
const MAX_VCPUS: u32 = 254;
/// The rights that Cloud Hypervisor asks for came with Linux 6.2.
const LANDLOCK_VERSION: u32 = 3;

/// For `Capabilities`, whatever Cloud Hypervisor has.
const MISSING: &[(&str, &str)] = &[
    ("tdx", "the launcher starts no confidential guests yet"),
    ("sev-snp", "the launcher starts no confidential guests yet"),
];

/// A running Cloud Hypervisor.
pub struct CloudHypervisor {
    process: Process,
    api: Api,
    events: Events,
    console: Console,
    attached: Attached,
    file_servers: FileServers,
    run_dir: RunDir,
    sizes: Mutex<Sizes>,
    lifetime: Lifetime,
    known: Constant,
}

/// What another launcher needs to know that does not change.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Constant {
    run_dir: PathBuf,
    state_dir: PathBuf,
    console_log: Option<PathBuf>,
    /// The number of Cloud Hypervisor's descriptor for them.
    events: i32,
    file_servers: KnownFileServers,
    /// The devices that the VM was born with and that do not go away.
    #[serde(default)]
    born_with: Vec<String>,
}

/// What another launcher needs to know, beside Cloud Hypervisor's process.
#[derive(Debug, Deserialize, Serialize)]
struct Own {
    constant: Constant,
    attached: HashMap<String, KnownHostSide>,
    sizes: Sizes,
}

impl Hypervisor for CloudHypervisor {
    const NAME: &'static str = "cloud-hypervisor";
    const DEFAULT_PATH: &'static str = "/usr/bin/cloud-hypervisor";

    const HUGE_PAGES: Result<(), &'static str> = Ok(());
    const OUTLIVES_LAUNCHER: Result<(), &'static str> = Ok(());

    fn options() -> Value {
        describe::<Options>(DOCS)
    }

    async fn capabilities(path: &Path, _options: &str) -> Result<CapabilitiesResponse> {
        let mut able = CapabilitiesResponse { version: probe::version(path).await?, ..Default::default() };
        never(MISSING, &mut able);
        probe::devices(path, &mut able).await?;
        match kvm::probe_aside().await {
            Ok(()) => {
                (able.accelerator, able.accelerator_reason) = ("kvm".into(), "/dev/kvm runs guests".into());
                probe::operations(path, &mut able).await?;
            }
            // It does not start without, and cannot be asked for more.
            Err(why) => able.accelerator_reason = format!("Cloud Hypervisor needs KVM: {why}"),
        }
        Ok(able)
    }

    async fn create(request: &CreateRequest, audience: Audience) -> Result<Created<Self>> {
        let vm = request::check(request, MAX_VCPUS)?;
        let options: Options = parse(&request.options)?;
        options.block_device_driver.check(Bus::Pci)?;
        kernel::format(Path::new(&vm.kernel))?;
        let run_dir = Path::new(&request.run_dir);
        let landlock = uses_landlock(options.landlock)?;
        let configuration = Configuration::of(vm, &options, landlock, run_dir)?;
        let started = start(request, vm, &options, Jail::default()).await?;
        let created = async {
            started.api.create(&configuration.body).await?;
            check_landlock(options.landlock, started.api.is_confined().await?)?;
            let host = Host { run_dir: &started.run_dir, lifetime: &started.lifetime };
            for device in vm.devices.iter().filter(|device| configuration::comes_before_the_boot(device)) {
                started.attached.attach(device, &host, &started.api).await?;
            }
            Ok(())
        };
        let created = created.await;
        started.into_created(created, vm, configuration.devices, audience).await
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
        let landlock = uses_landlock(options.landlock)?;
        let devices = Configuration::of(vm, &options, landlock, Path::new(&request.run_dir))?.devices;
        let cards = cards(vm)?;
        let mut jail = Jail::default();
        jail.show(&request.directory, SNAPSHOT, false);
        jail.make_directory(NO_TUN);
        let started = start(&as_new, vm, &options, jail).await?;
        let restored = async {
            started.api.restore(SNAPSHOT, cards).await?;
            // It may be saved again, there.
            jail::hide(started.process.pid(), Path::new(SNAPSHOT)).await?;
            check_landlock(options.landlock, started.api.is_confined().await?)
        };
        let restored = restored.await;
        started.into_created(restored, vm, devices, audience).await
    }

    async fn boot(&self) -> Result<()> {
        self.explained(self.api.boot().await).await
    }

    async fn power_off(&self) -> Result<()> {
        self.api.press_power_button().await
    }

    async fn pause(&self) -> Result<()> {
        self.explained(self.api.pause().await).await
    }

    async fn resume(&self) -> Result<()> {
        self.explained(self.api.resume().await).await
    }

    async fn attach(&self, device: &Device) -> Result<GuestDevice> {
        if self.known.born_with.contains(&device.id) {
            return Err(Error::Invalid(format!("the VM has a device \"{}\" already", device.id)));
        }
        let host = Host { run_dir: &self.run_dir, lifetime: &self.lifetime };
        self.explained(self.attached.attach(device, &host, &self.api).await).await
    }

    async fn detach(&self, id: &str) -> Result<()> {
        self.explained(self.attached.detach(id, &self.api).await).await
    }

    async fn snapshot(&self, request: &SnapshotRequest) -> Result<()> {
        snapshot::check(self.api.state().await?, &request.directory)?;
        let pid = self.process.pid();
        jail::show(pid, Path::new(&request.directory), Path::new(SNAPSHOT), true).await?;
        let made = self.explained(self.api.snapshot(SNAPSHOT).await).await;
        let hidden = jail::hide(pid, Path::new(SNAPSHOT)).await;
        made.and(hidden)
    }

    /// It does not tell how many of them the guest uses.
    async fn resize_vcpus(&self, request: &ResizeVcpusRequest) -> Result<u32> {
        self.sizes().can_have_vcpus(request.vcpus)?;
        self.explained(self.api.resize_vcpus(request.vcpus).await).await?;
        self.sizes().now.vcpus = request.vcpus;
        Ok(request.vcpus)
    }

    /// It does not tell when the guest has come so far: the answer is how far it is now.
    async fn resize_memory(&self, request: &ResizeMemoryRequest) -> Result<u64> {
        self.sizes().can_have_memory(request.memory_mib)?;
        self.explained(self.api.resize_memory(request.memory_mib).await).await?;
        self.api.memory_mib().await
    }

    /// As [`Self::resize_memory`].
    async fn resize_balloon(&self, request: &ResizeBalloonRequest) -> Result<u64> {
        self.sizes().can_give(request.memory_mib)?;
        self.explained(self.api.resize_balloon(request.memory_mib).await).await
    }

    fn kill(&self) {
        self.process.kill();
    }

    async fn ended(&self) -> WaitResponse {
        let helper_failed = async {
            tokio::select! {
                words = self.file_servers.failed() => words,
                words = self.attached.failed() => words,
            }
        };
        let (ended, helper) = tokio::select! {
            end = self.process.ended_with(helper_failed) => end,
            () = self.events.rebooting() => {
                self.process.kill();
                (self.process.ended().await, None)
            }
        };
        self.console.drained().await;
        self.file_servers.end().await;
        self.attached.end_all().await;
        self.run_dir.remove();
        if self.lifetime.is_longer() {
            let _ = fs::remove_file(self.known.state_dir.join(API));
        }
        let (reason, detail) = match helper {
            Some(helper) => (ExitReason::HYPERVISOR_FAILED, helper),
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
        let own = Own { constant: self.known.clone(), attached: self.attached.known(), sizes: *self.sizes() };
        Ok(Memory {
            process: self.process.known(),
            console_log: self.known.console_log.clone(),
            own: serde_json::to_value(own).expect("paths of requests are UTF-8"),
        })
    }

    async fn adopt(state_dir: &Path, memory: Memory) -> Result<Adopted<Self>> {
        let Own { constant: known, attached, sizes } = memory.own()?;
        let process = Process::adopt(&memory.process)?;
        let pid = process.pid();
        let events = Events::adopt(pid, known.events).map_err(Error::host("listen to Cloud Hypervisor's events"));
        let (events, removed) = events?;
        let attached = Attached::adopt(pid, attached, removed);
        let run_dir = RunDir::new(&known.run_dir);
        let api = state_dir.join(API);
        let stream = UnixStream::connect(&api).await.map_err(Error::host(format!("connect to {}", api.display())))?;
        let api = Api::over(stream).await?;
        let state = api.state().await?;
        let serial = connect(&memory.process, &run_dir.path(SERIAL)).await?;
        let console = Console::adopt(serial, known.console_log.as_deref())?;
        let hypervisor = Self {
            file_servers: FileServers::adopt(&known.file_servers)?,
            process,
            api,
            events,
            console,
            attached,
            run_dir,
            sizes: Mutex::new(sizes),
            lifetime: Lifetime::of_vm(state_dir)?,
            known,
        };
        Ok(Adopted { hypervisor, state })
    }

    async fn metrics(&self) -> Result<String> {
        let mut metrics = metrics::Metrics::default();
        let memory_mib = self.api.memory_mib().await?;
        metrics.size(Size { memory_mib, ..self.sizes().now });
        let counters = match self.api.counters().await {
            // There is nothing to count, and it says so by refusing.
            Err(_) if self.api.state().await? == VmState::CREATED => Value::Null,
            counters => counters?,
        };
        for (key, family) in [
            ("read_bytes", metrics::BLOCK_READ),
            ("write_bytes", metrics::BLOCK_WRITTEN),
            ("rx_bytes", metrics::NET_RECEIVED),
            ("tx_bytes", metrics::NET_SENT),
        ] {
            let devices = counters.as_object().into_iter().flatten();
            metrics.by_label(family, "device", devices.filter_map(|(id, one)| Some((id.as_str(), one[key].as_u64()?))));
        }
        Ok(metrics.text())
    }
}

/// The network cards of `vm` with their open taps.
fn cards(vm: &VmConfig) -> Result<Vec<(String, Vec<OwnedFd>)>> {
    let cards = vm.devices.iter().filter(|device| matches!(device.kind, Some(Kind::Net(_))));
    cards.map(|card| Ok((card.id.clone(), configuration::taps(card)?))).collect()
}

/// The devices of `vm` that have their names for good.
fn born_with(vm: &VmConfig) -> Vec<String> {
    let stay = vm.devices.iter().filter(|device| !configuration::comes_before_the_boot(device));
    stay.map(|device| device.id.clone()).collect()
}

/// A Cloud Hypervisor without a VM.
struct Started {
    process: Process,
    api: Api,
    events: Events,
    attached: Attached,
    file_servers: FileServers,
    run_dir: RunDir,
    lifetime: Lifetime,
    known: Constant,
}

/// Starts Cloud Hypervisor in `jail` until its API answers, and its file servers. When this fails or is given up, they
/// have ended.
async fn start(request: &CreateRequest, vm: &VmConfig, options: &Options, mut jail: Jail) -> Result<Started> {
    let started = Instant::now();
    let (run_dir, state_dir) = (Path::new(&request.run_dir), PathBuf::from(&request.state_dir));
    kvm::require("Cloud Hypervisor").await?;
    configuration::show(vm, run_dir, &mut jail);
    let lifetime = Lifetime::of(request)?;
    jail.let_live(&lifetime);
    let run_dir = RunDir::new(run_dir);
    let mut file_servers = FileServers::default();
    for device in &vm.devices {
        if let Some(Kind::Fs(fs)) = &device.kind {
            file_servers.add(Virtiofsd::listen(fs, &run_dir.fs_socket(&device.id), &lifetime)?);
        }
    }
    let (listener, connection) = match lifetime.is_longer() {
        // Not in the run directory: what is there the guest's hypervisor can replace.
        true => named_listener(&state_dir.join(API))?,
        false => connected_listener(&run_dir.path(API))?,
    };
    let listener = OwnedFd::from(listener);
    let (events, removed, monitor) = Events::pipe().map_err(Error::host("make a pipe for events"))?;
    let known = Constant {
        run_dir: request.run_dir.clone().into(),
        state_dir,
        console_log: console::log_of(&vm.devices).map(Path::to_owned),
        events: monitor.as_raw_fd(),
        file_servers: file_servers.known(&lifetime),
        born_with: born_with(vm),
    };
    let descriptor = |option: &str, fd: &OwnedFd| [option.to_owned(), format!("fd={}", fd.as_raw_fd())];
    let mut arguments = descriptor("--api-socket", &listener).to_vec();
    arguments.extend(descriptor("--event-monitor", &monitor));
    arguments.extend(options.extra_args.iter().cloned());

    debug!(?arguments, "starting Cloud Hypervisor");
    let program = Path::new(&vm.hypervisor_path);
    let process = jail.start(program, &arguments, vec![listener, monitor], Streams::none())?;
    let attached = Attached::new(process.pid(), removed);
    let api = Api::on(connection).await?;
    let started_up = Started { process, api, events, attached, file_servers, run_dir, lifetime, known };
    let answered = tokio::select! {
        // What ended explains why nothing answers.
        biased;
        helper = started_up.file_servers.failed() => Err(Error::Hypervisor(helper)),
        ended = started_up.process.ended() => {
            let ended = started_up.process.describe(&ended);
            Err(Error::Hypervisor(format!("Cloud Hypervisor did not start: {ended}")))
        }
        answered = started_up.api.ping() => answered,
    };
    match answered {
        Ok(version) => {
            info!(start = ?started.elapsed(), version, "Cloud Hypervisor started");
            Ok(started_up)
        }
        Err(error) => Err(started_up.end(error).await),
    }
}

impl Started {
    /// A VM, unless Cloud Hypervisor refused it; then everything ends first.
    async fn into_created(
        self,
        done: Result<()>,
        vm: &VmConfig,
        devices: Vec<GuestDevice>,
        audience: Audience,
    ) -> Result<Created<CloudHypervisor>> {
        // A file server that dies explains a VM that could not be.
        if let Err(refusal) = done {
            return Err(self.end(refusal).await);
        }
        let console = UnixStream::connect(self.run_dir.path(SERIAL))
            .await
            .map_err(Error::host("connect to the guest's serial port"))
            .and_then(|connection| Console::over(connection, console::log_of(&vm.devices), audience));
        let console = match console {
            Ok(console) => console,
            Err(error) => return Err(self.end(error).await),
        };
        let Self { process, api, events, attached, file_servers, run_dir, lifetime, known } = self;
        let hypervisor = CloudHypervisor {
            process,
            api,
            events,
            console,
            attached,
            file_servers,
            run_dir,
            sizes: Mutex::new(Sizes::of(vm)),
            lifetime,
            known,
        };
        Ok(Created { hypervisor, devices })
    }

    /// Answers with `why`, and with Cloud Hypervisor's last words when it has ended by itself.
    async fn end(self, why: Error) -> Error {
        let why = self.process.last_words(why, |ended| self.process.describe(ended)).await;
        self.process.kill();
        self.process.ended().await;
        self.file_servers.end().await;
        why
    }
}

impl CloudHypervisor {
    fn sizes(&self) -> MutexGuard<'_, Sizes> {
        self.sizes.lock().expect("nobody panics with the sizes")
    }

    /// `done`, and Cloud Hypervisor's last words when it has ended instead.
    async fn explained<T>(&self, done: Result<T>) -> Result<T> {
        match done {
            Err(refusal) => Err(self.process.last_words(refusal, |ended| self.process.describe(ended)).await),
            done => done,
        }
    }

    fn explain(&self, ended: &Ended) -> (ExitReason, String) {
        if let Some(words) = self.console.panic() {
            return (ExitReason::GUEST_PANIC, format!("the guest kernel panicked: {words}"));
        }
        if self.events.has_rebooted() {
            return (ExitReason::GUEST_SHUTDOWN, "the guest rebooted, which ends its VM".into());
        }
        if ended.well() {
            return (ExitReason::GUEST_SHUTDOWN, "the guest powered off".into());
        }
        (ExitReason::HYPERVISOR_FAILED, self.process.describe(ended))
    }
}

/// # Errors
/// When it is demanded and the host has none.
fn uses_landlock(wish: Landlock) -> Result<bool> {
    let version = jail::landlock_version();
    match wish {
        Landlock::Off => Ok(false),
        Landlock::Auto => Ok(version >= LANDLOCK_VERSION),
        Landlock::On if version >= LANDLOCK_VERSION => Ok(true),
        Landlock::On => Err(Error::Invalid(format!(
            "landlock = \"on\" cannot be had on this machine: the kernel's Landlock has version {version} and Cloud \
             Hypervisor needs {LANDLOCK_VERSION}, Linux 6.2; \"auto\" does without"
        ))),
    }
}

/// # Errors
/// When Cloud Hypervisor is confined otherwise than it has to be.
fn check_landlock(wish: Landlock, is_confined: bool) -> Result<()> {
    match (wish, is_confined) {
        (Landlock::On, false) => Err(Error::Invalid(
            "landlock = \"on\" cannot be had: this Cloud Hypervisor has no Landlock, or the snapshot is one of a VM \
             without; \"auto\" does without"
                .into(),
        )),
        (Landlock::Off, true) => Err(Error::Invalid(
            "landlock = \"off\" cannot be had: the snapshot is one of a VM with Landlock; \"auto\" takes what it has"
                .into(),
        )),
        (Landlock::On, true) | (Landlock::Off, false) | (Landlock::Auto, _) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn landlock_is_in_force_as_it_is_demanded_or_the_vm_is_refused() {
        assert!(check_landlock(Landlock::On, false).unwrap_err().to_string().starts_with("landlock = \"on\" cannot"));
        assert!(check_landlock(Landlock::Off, true).unwrap_err().to_string().starts_with("landlock = \"off\" cannot"));
        assert!(check_landlock(Landlock::On, true).is_ok() && check_landlock(Landlock::Off, false).is_ok());
        assert!(check_landlock(Landlock::Auto, true).is_ok() && check_landlock(Landlock::Auto, false).is_ok());
    }
}
