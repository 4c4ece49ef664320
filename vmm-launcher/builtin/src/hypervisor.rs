//! The library's [`Hypervisor`], which here is this very process.

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Mutex, MutexGuard},
};

use caisson_protocol::vmm::{CapabilitiesResponse, CreateRequest, ExitReason, GuestDevice, WaitResponse};
use caisson_vmm_launcher::{
    Error, Result,
    console::{self, Audience, Console},
    hypervisor::{Created, Hypervisor},
    kvm,
    metrics::{MEMORY, Metrics, VCPUS},
    options::{describe, parse},
    request,
    virtiofsd::{self, Virtiofsd},
    vm::exit,
};
use tracing::info;

use crate::{
    arch,
    builder::{Parts, build_vm},
    devices::KINDS,
    ending::{End, Ending},
    machine::Machine,
    options::{DOCS, Options},
};

/// This program: there is no other one to execute.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The built-in VMM with its VM.
pub struct Builtin {
    /// Until the VM has ended.
    machine: Mutex<Option<Machine>>,
    ending: Ending,
    console: Console,
    file_servers: Mutex<Vec<Virtiofsd>>,
    memory_mib: u64,
    vcpus: u32,
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

    fn options() -> serde_json::Value {
        describe::<Options>(DOCS)
    }

    async fn capabilities(path: &Path) -> Result<CapabilitiesResponse> {
        check_program(path)?;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let (accelerator, accelerator_reason) = match kvm::probe_aside().await {
            Ok(()) => ("kvm".to_owned(), "/dev/kvm runs guests".to_owned()),
            Err(why) => (String::new(), format!("the built-in VMM needs KVM: {why}")),
        };
        Ok(CapabilitiesResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            devices: words(&KINDS),
            operations: words(&["pause"]),
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
        if !arch::processor_runs_guests() {
            // KVM may still be there, and emulate: only trying tells.
            kvm::require("the built-in VMM").await?;
        }
        let (console, far) = Console::open(console::log_of(&config.devices), audience)?;
        let (ending, mut file_servers) = (Ending::default(), Vec::new());
        let parts = Parts {
            options: &options,
            run_dir: Path::new(&request.run_dir),
            console: far,
            ending: &ending,
            file_servers: &mut file_servers,
        };
        let (machine, addresses) = match build_vm(config, parts) {
            Ok(built) => built,
            Err(error) => {
                end(file_servers).await;
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
            file_servers: Mutex::new(file_servers),
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
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

    fn kill(&self) {
        self.ending.tell(End::Forced);
    }

    async fn ended(&self) -> WaitResponse {
        let file_servers = std::mem::take(&mut *self.file_servers.lock().expect("nobody panics with them"));
        let why = tokio::select! {
            end = self.ending.told() => end,
            words = virtiofsd::any_failed(&file_servers) => End::Failed(words),
        };
        // A vCPU that is still in the guest, or that comes out of it, goes no further.
        self.ending.tell(why.clone());
        let machine = self.machine().take();
        // It waits for threads.
        let _ = tokio::task::spawn_blocking(move || drop(machine)).await;
        self.console.drained().await;
        end(file_servers).await;
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
        metrics.number(MEMORY, self.memory_mib << 20);
        metrics.number(VCPUS, self.vcpus.into());
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

async fn end(file_servers: Vec<Virtiofsd>) {
    for file_server in file_servers {
        file_server.end().await;
    }
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
