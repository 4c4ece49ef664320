//! The sandbox: one virtual machine and the containers in it. Owns its life; the only file that changes its state.
//!
//! ```text
//! Empty ─first Create─► Booting ─agent ready─► Running ─Shutdown, or the VM ends─► Ended
//!                          └────────── failure, stop ──────────────────────────────►┘
//! ```

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use caisson_config_service::client::resolve;
use caisson_protocol::{
    config::ResolveRequest,
    containerd::{api::CreateTaskRequest, events::task::TaskOOM, topics},
    guest::{Event, EventsRequest, event::Kind},
    id::Id,
    no_deadline,
    paths::SandboxDir,
    runtimeoptions::Options,
    vmm::WaitResponse,
};
use protobuf::Message;
use tokio::{
    sync::{RwLock, watch},
    task::spawn_blocking,
};
use tracing::{info, warn};

use crate::{
    Error, Result,
    bundle::Bundle,
    container::Container,
    events::Publisher,
    guest_spec::for_guest,
    hooks::HostHooks,
    process::{Exit, lock},
    record::Record,
    share::{self, ContainerShare},
    stages::Stages,
    vm::{Needs, REQUEST_DEADLINE, Vm, prepare_shared},
};

/// Exit status of what ran in a virtual machine that ended.
const LOST: u32 = 255;

enum Phase {
    Empty,
    Booting,
    Running(Arc<Vm>),
    Ended,
}

/// See the module.
pub struct Sandbox {
    namespace: Id,
    id: Id,
    dir: SandboxDir,
    publisher: Publisher,
    phase: Mutex<Phase>,
    containers: Mutex<HashMap<Id, Arc<Container>>>,
    stop: watch::Sender<bool>,
    /// Held for reading by each creation under way.
    creating: RwLock<()>,
}

impl Sandbox {
    /// A sandbox without a virtual machine; its directory exists.
    pub fn new(namespace: Id, id: Id, publisher: Publisher) -> Arc<Self> {
        Arc::new(Self {
            dir: SandboxDir::of(&namespace, &id),
            namespace,
            id,
            publisher,
            phase: Mutex::new(Phase::Empty),
            containers: Mutex::default(),
            stop: watch::Sender::new(false),
            creating: RwLock::default(),
        })
    }

    /// Creates a container, and for the first one the virtual machine under it. Answers the hypervisor's pid.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32> {
        let _creating = self.creating.read().await;
        let mut stages = Stages::begin();
        let id = Id::parse("container id", &request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported("restoring a container from a checkpoint is not supported".into()));
        }
        if lock(&self.containers).contains_key(&id) {
            return Err(Error::Exists { what: "container", id });
        }
        let bundle = Bundle::load(Path::new(&request.bundle))?;
        let (spec, shared_paths) = for_guest(bundle.spec.clone(), &id, &bundle.role()?);
        let first = self.begin_boot()?;
        if first.is_none() {
            prepare_shared(&self.dir).inspect_err(|_| self.boot_failed())?;
        }
        // The root filesystem is mounted while the virtual machine boots.
        let (dir, share_id, rootfs) = (self.dir.clone(), id.clone(), request.rootfs.clone());
        let share = spawn_blocking(move || ContainerShare::prepare(&dir, &share_id, &rootfs, &shared_paths));
        let vm = match first {
            Some(vm) => Ok(vm),
            None => self.boot(&bundle, &request, &mut stages).await.inspect_err(|_| self.boot_failed()),
        };
        // Also after a failed boot: nothing may be mounted later.
        let share = share.await.map_err(|error| Error::host("mount the root filesystem")(error.into()))?;
        let (vm, share) = (vm?, share?);
        stages.end("rootfs");

        let container =
            Arc::new(Container::new(id.clone(), &request, share, HostHooks::of(bundle.spec.hooks().as_ref())));
        lock(&self.containers).insert(id.clone(), container.clone());
        if let Err(error) = container.create(&vm, &self.publisher, request, &spec).await {
            lock(&self.containers).remove(&id);
            container.remove_share().await;
            return Err(error);
        }
        stages.end("container");
        info!(container = %id, stages = stages.text(), "sandbox started");
        Ok(vm.pid)
    }

    async fn boot(
        self: &Arc<Self>,
        bundle: &Bundle,
        request: &CreateTaskRequest,
        stages: &mut Stages,
    ) -> Result<Arc<Vm>> {
        let question = ResolveRequest {
            config_path: config_path(request),
            annotations: bundle.annotations(),
            ..Default::default()
        };
        let mut stop = self.stop.subscribe();
        let config = tokio::select! {
            config = resolve(&question, REQUEST_DEADLINE) => config,
            _ = stop.wait_for(|stop| *stop) => return Err(Error::Stopped),
        };
        let config = config.map_err(|error| Error::Remote { context: String::new(), status: error.into() })?;
        for warning in &config.warnings {
            warn!(file = config.origin, %warning, "an older state of the configuration is in force");
        }
        stages.end("config");
        let needs = Needs {
            hostname: bundle.spec.hostname().clone().unwrap_or_else(|| self.id.to_string()),
            memory_mib: bundle.memory_limit_mib().unwrap_or_default(),
            vcpus: bundle.vcpu_limit().unwrap_or_default(),
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut record = Record {
            namespace: self.namespace.to_string(),
            id: self.id.to_string(),
            shim_pid: std::process::id(),
            created_unix_ms: now.as_millis() as u64,
            ..Record::default()
        };
        let vm = Arc::new(Vm::boot(config, needs, &self.dir, &mut record, stages, stop).await?);
        *lock(&self.phase) = Phase::Running(vm.clone());
        tokio::spawn(follow_events(self.clone(), vm.clone()));
        tokio::spawn(follow_end(self.clone(), vm.clone()));
        Ok(vm)
    }

    /// The running VM, or `None` for the one caller who shall boot it.
    fn begin_boot(&self) -> Result<Option<Arc<Vm>>> {
        let mut phase = lock(&self.phase);
        match &*phase {
            Phase::Empty => {
                *phase = Phase::Booting;
                Ok(None)
            }
            Phase::Running(vm) => Ok(Some(vm.clone())),
            Phase::Booting => Err(wrong("add a container to", "booting")),
            Phase::Ended => Err(wrong("add a container to", "ended")),
        }
    }

    fn boot_failed(&self) {
        let mut phase = lock(&self.phase);
        match &*phase {
            Phase::Booting => *phase = Phase::Ended,
            Phase::Empty | Phase::Running(_) | Phase::Ended => {}
        }
    }

    /// The virtual machine, for calls into the guest.
    pub fn vm(&self) -> Result<Arc<Vm>> {
        match &*lock(&self.phase) {
            Phase::Running(vm) => Ok(vm.clone()),
            Phase::Empty => Err(wrong("reach the guest of", "empty")),
            Phase::Booting => Err(wrong("reach the guest of", "booting")),
            // Whatever is asked about has ended with the guest.
            Phase::Ended => Err(Error::Finished),
        }
    }

    /// The container with this name.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let id = Id::parse("container id", id)?;
        let container = lock(&self.containers).get(&id).cloned();
        container.ok_or(Error::NotFound { what: "container", id })
    }

    /// Forgets a deleted container.
    pub fn forget(&self, id: &Id) {
        lock(&self.containers).remove(id);
    }

    /// Whether nothing runs in it.
    pub fn is_empty(&self) -> bool {
        lock(&self.containers).is_empty()
    }

    /// For events.
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }

    /// Stops everything, also a boot under way, and removes what the sandbox has on the host. Idempotent.
    pub async fn end(&self) {
        let mut stages = Stages::begin();
        self.stop.send_replace(true);
        let _ended = self.creating.write().await;
        let phase = std::mem::replace(&mut *lock(&self.phase), Phase::Ended);
        if let Phase::Running(vm) = phase {
            vm.end().await;
            stages.end("stop");
        }
        let containers: Vec<_> = lock(&self.containers).drain().map(|(_, container)| container).collect();
        for container in containers {
            container.remove_share().await;
        }
        let dir = self.dir.clone();
        // A panic there has been printed.
        let _ = spawn_blocking(move || remove(&dir)).await;
        stages.end("cleanup");
        info!(stages = stages.text(), "sandbox ended");
    }

    fn vm_ended(&self, vm: &Vm, end: &WaitResponse) {
        let was_running = {
            let mut phase = lock(&self.phase);
            let running = matches!(&*phase, Phase::Running(_));
            if running {
                *phase = Phase::Ended;
            }
            running
        };
        if !was_running {
            return;
        }
        warn!(detail = %end.detail, console = %end.console_tail.escape_debug(), "the virtual machine ended");
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let exit = Exit { status: LOST, at_unix_ns: now.as_nanos() as i64 };
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        for container in containers {
            container.all_exited(&self.publisher, exit, vm.pid);
        }
    }

    fn guest_event(&self, vm: &Vm, event: Event) {
        match event.kind {
            Some(Kind::ProcessExited(exited)) => {
                let pid = if exited.exec_id.is_empty() { vm.pid } else { exited.pid };
                if let Ok(container) = self.container(&exited.container_id) {
                    container.exited(&self.publisher, &exited.exec_id, Exit::of(&exited), pid);
                }
            }
            Some(Kind::OutOfMemory(oom)) => {
                if let Ok(container) = self.container(&oom.container_id) {
                    let event = TaskOOM { container_id: container.id.to_string(), ..Default::default() };
                    self.publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
                }
            }
            Some(_) | None => {}
        }
    }
}

async fn follow_events(sandbox: Arc<Sandbox>, vm: Arc<Vm>) {
    if let Ok(mut events) = vm.guest.events(no_deadline(), &EventsRequest::new()).await {
        while let Ok(Some(event)) = events.recv().await {
            sandbox.guest_event(&vm, event);
        }
    }
    // A guest that no longer tells what happens is as good as gone. Most often it is: then there is nothing to stop.
    if let Err(error) = vm.stop().await {
        tracing::debug!(%error, "nothing to stop");
    }
}

async fn follow_end(sandbox: Arc<Sandbox>, vm: Arc<Vm>) {
    let end = vm.wait().await;
    sandbox.vm_ended(&vm, &end);
}

/// Removes a sandbox's directory with all that is mounted in it. Logs what it cannot.
pub fn remove(dir: &SandboxDir) {
    let outcome = (|| {
        let shared = dir.shared();
        if shared.exists() {
            crate::mount::unmount_below(&shared)?;
            for entry in fs::read_dir(&shared)? {
                share::remove(&entry?.path())?;
            }
            fs::remove_dir(&shared)?;
        }
        match fs::remove_dir_all(dir.path()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    })();
    if let Err(error) = outcome {
        warn!(directory = %dir.path().display(), %error, "the sandbox's directory stays behind");
    }
}

/// The configuration file that containerd's runtime options name; empty when they name none.
fn config_path(request: &CreateTaskRequest) -> String {
    let options = request.options.as_ref().filter(|any| any.type_url.ends_with("runtimeoptions.v1.Options"));
    let options = options.and_then(|any| Options::parse_from_bytes(&any.value).ok());
    options.map(|options| options.config_path).unwrap_or_default()
}

fn wrong(verb: &'static str, state: &'static str) -> Error {
    Error::WrongState { verb, what: "sandbox", state }
}
