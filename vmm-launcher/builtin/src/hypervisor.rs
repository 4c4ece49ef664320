//! The library's [`Hypervisor`], which here is this very process.

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use caisson_protocol::vmm::{
    CapabilitiesResponse, CreateRequest, ExitReason, GuestDevice, ResizeBalloonRequest, WaitResponse,
};
use caisson_vmm_launcher::{
    Error, Result,
    block_driver::Bus,
    console::{self, Audience, Console},
    hypervisor::{Created, Hypervisor},
    kvm,
    metrics::Metrics,
    options::{describe, parse},
    request,
    size::{Sizes, no_balloon},
    virtiofsd::FileServers,
    vm::exit,
};
use tokio::{sync::oneshot, time::timeout};
use tracing::{info, warn};

use crate::{
    arch,
    builder::{Parts, build_vm},
    devices::KINDS,
    ending::{End, Ending},
    machine::Machine,
    options::{DOCS, FileServer, Options},
    seccomp::{Filter, Thread, Violations},
};

/// How long a process may take to end that does not answer any more.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// This program: there is no other one to execute.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The built-in VMM with its VM.
pub struct Builtin {
    /// Until the VM has ended.
    machine: Mutex<Option<Machine>>,
    ending: Ending,
    console: Console,
    file_servers: FileServers,
    violations: Option<Violations>,
    sizes: Sizes,
}

/// For `Capabilities`.
const MISSING: &[(&str, &str)] = &[
    ("block-hotplug", "its devices are there from the start"),
    ("net-hotplug", "its devices are there from the start"),
    ("vfio", "it has no PCI bus"),
    ("snapshot", "it does not save its guests yet"),
    ("resize-vcpus", "its processors are there from the start"),
    ("resize-memory", "its memory is there from the start"),
    ("tdx", "it starts no confidential guests"),
    ("sev-snp", "it starts no confidential guests"),
];

impl Hypervisor for Builtin {
    const NAME: &'static str = "builtin";
    const DEFAULT_PATH: &'static str = THIS_PROGRAM;

    const HUGE_PAGES: Result<(), &'static str> = Ok(());
    const OUTLIVES_LAUNCHER: Result<(), &'static str> = Err("the launcher is the VM and ends with it");

    fn options() -> serde_json::Value {
        describe::<Options>(DOCS)
    }

    async fn capabilities(path: &Path, _options: &str) -> Result<CapabilitiesResponse> {
        check_program(path)?;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let (accelerator, accelerator_reason) = match kvm::probe_aside().await {
            Ok(()) => ("kvm".to_owned(), "/dev/kvm runs guests".to_owned()),
            Err(why) => (String::new(), format!("the built-in VMM needs KVM: {why}")),
        };
        Ok(CapabilitiesResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            devices: words(&KINDS),
            operations: words(&["pause", "resize-balloon"]),
            accelerator,
            accelerator_reason,
            missing: MISSING.iter().map(|(what, why)| ((*what).to_owned(), (*why).to_owned())).collect(),
            ..Default::default()
        })
    }

    async fn create(request: &CreateRequest, audience: Audience) -> Result<Created<Self>> {
        let config = request::check(request, arch::MAX_VCPUS)?;
        check_program(Path::new(&config.hypervisor_path))?;
        let options: Options = parse(&request.options)?;
        options.block_device_driver.check(Bus::Mmio)?;
        if !arch::processor_runs_guests() {
            // KVM may still be there, and emulate: only trying tells.
            kvm::require("the built-in VMM").await?;
        }
        let (console, far) = Console::open(console::log_of(&config.devices), audience)?;
        let confinement = options.seccomp.then(|| Confinement::prepare(&options)).transpose()?;
        let (ending, mut file_servers) = (Ending::default(), FileServers::default());
        let parts = Parts {
            options: &options,
            run_dir: Path::new(&request.run_dir),
            console: far,
            ending: &ending,
            filter: confinement.as_ref().map(|confinement| confinement.devices.clone()),
            file_servers: &mut file_servers,
        };
        let built = match build_vm(config, parts) {
            Ok(built) => meet(&file_servers, built.0.backends()).await.map(|()| built),
            Err(error) => Err(error),
        };
        let (machine, addresses) = match built {
            Ok(built) => built,
            Err(error) => {
                file_servers.end().await;
                return Err(error);
            }
        };
        let guest_device = |(device, address): (&caisson_protocol::vmm::Device, _)| GuestDevice {
            id: device.id.clone(),
            address,
            ..Default::default()
        };
        let devices = config.devices.iter().zip(addresses).map(guest_device).collect();
        let hypervisor = Self {
            machine: Mutex::new(Some(machine)),
            ending,
            console,
            file_servers,
            violations: confinement.map(Confinement::enter),
            sizes: Sizes::of(config),
        };
        Ok(Created { hypervisor, devices })
    }

    async fn boot(&self) -> Result<()> {
        self.with_machine("boot", Machine::run)
    }

    async fn pause(&self) -> Result<()> {
        self.with_machine("pause", Machine::stand)?.await
    }

    async fn resume(&self) -> Result<()> {
        self.with_machine("resume", Machine::run)
    }

    async fn power_off(&self) -> Result<()> {
        self.with_machine("power off", Machine::press_power_button)?
    }

    async fn resize_balloon(&self, request: &ResizeBalloonRequest) -> Result<u64> {
        const VERB: &str = "resize the balloon of";
        self.sizes.can_give(request.memory_mib)?;
        let mut balloon = self.with_machine(VERB, Machine::balloon)?.ok_or_else(no_balloon)?;
        balloon.set_target(request.memory_mib << 20);
        // How far the guest has come is an answer too.
        let _ = timeout(Duration::from_millis(request.timeout_ms.into()), balloon.settled()).await;
        self.with_machine(VERB, |_| balloon.actual() >> 20)
    }

    fn kill(&self) {
        self.ending.tell(End::Forced);
    }

    async fn ended(&self) -> WaitResponse {
        let (why, stands_still) = tokio::select! {
            end = self.ending.told() => (end, false),
            words = self.file_servers.failed() => (End::Failed(words), false),
            words = self.violation() => (End::Failed(words), true),
        };
        // A vCPU that is still in the guest, or that comes out of it, goes no further.
        self.ending.tell(why.clone());
        let machine = self.machine().take();
        if stands_still {
            // A thread that was stopped does not end before the process does, and may hold any lock.
            machine.into_iter().for_each(Machine::abandon);
        } else {
            self.end_threads(machine).await;
        }
        self.console.drained().await;
        self.file_servers.end().await;
        let (reason, detail) = self.explain(why);
        info!(?reason, "the guest's threads have ended");
        WaitResponse { console_tail: self.console.tail(), ..exit(reason, detail) }
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn console(&self) -> &Console {
        &self.console
    }

    async fn metrics(&self) -> Result<String> {
        let mut metrics = Metrics::default();
        metrics.size(self.sizes.now);
        Ok(metrics.text() + &self.with_machine("count for", Machine::metrics)?)
    }
}

impl Builtin {
    fn machine(&self) -> MutexGuard<'_, Option<Machine>> {
        self.machine.lock().expect("nobody panics with the machine")
    }

    /// The VM may end between the state machine's check and this.
    fn with_machine<T>(&self, verb: &'static str, act: impl FnOnce(&Machine) -> T) -> Result<T> {
        self.machine().as_ref().map(act).ok_or(Error::WrongState { verb, state: "ended" })
    }

    /// Drops the machine on a thread of its own, because that waits for others. One that was stopped by its filter meanwhile
    /// is not waited for: it goes with the process.
    async fn end_threads(&self, machine: Option<Machine>) {
        let (tell, ended) = oneshot::channel();
        // A host without another thread drops it here.
        let _ = std::thread::Builder::new().name("ending".into()).spawn(move || {
            drop(machine);
            let _ = tell.send(());
        });
        tokio::select! {
            _ = ended => {}
            words = self.violation() => warn!("while the VM's threads ended, {words}"),
        }
    }

    /// Answers when a thread was stopped by its filter.
    async fn violation(&self) -> String {
        match &self.violations {
            Some(violations) => violations.told().await,
            None => std::future::pending().await,
        }
    }

    fn explain(&self, end: End) -> (ExitReason, String) {
        if let Some(words) = self.console.panic() {
            return (ExitReason::GUEST_PANIC, format!("the guest kernel panicked: {words}"));
        }
        match end {
            End::PoweredOff => (ExitReason::GUEST_SHUTDOWN, "the guest powered off".into()),
            End::Reset => (ExitReason::GUEST_SHUTDOWN, "the guest rebooted, which ends its VM".into()),
            End::Forced => (ExitReason::STOPPED, "the VM was stopped".into()),
            End::Failed(why) => (ExitReason::HYPERVISOR_FAILED, why),
        }
    }
}

/// The filters, before anyone has submitted to them.
struct Confinement {
    devices: Filter,
    contract: Filter,
    violations: Violations,
}

impl Confinement {
    fn prepare(options: &Options) -> Result<Self> {
        let serves_files = options.file_server == FileServer::Builtin;
        Ok(Self {
            devices: Filter::of(Thread::Device { serves_files })?,
            contract: Filter::of(Thread::Contract)?,
            violations: Violations::watch()?,
        })
    }

    /// For this thread, which has executed all programs and opened all files that the VM needs.
    fn enter(self) -> Violations {
        self.contract.submit();
        self.violations
    }
}

/// Waits until the file servers serve: a guest without its files is of no use.
async fn meet(file_servers: &FileServers, backends: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    if file_servers.is_empty() {
        return Ok(());
    }
    let met = tokio::task::spawn_blocking(backends).await.unwrap_or(Ok(()));
    let Err(error) = met else { return Ok(()) };
    // One that has ended has last words.
    let words = timeout(LAST_WORDS, file_servers.failed()).await;
    Err(words.map_or(error, Error::Hypervisor))
}

/// A request that names a hypervisor means another one than this.
fn check_program(path: &Path) -> Result<()> {
    let identity = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino()));
    let file = |source| Error::File { what: "hypervisor", path: path.to_owned(), source };
    if identity(path).map_err(file)? == identity(Path::new(THIS_PROGRAM)).map_err(file)? {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{} cannot be the hypervisor: the built-in VMM is the launcher itself and executes no other program",
        path.display()
    )))
}
