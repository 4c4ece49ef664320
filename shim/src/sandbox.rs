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
    time::{Duration, SystemTime},
};

use caisson_config_service::client::resolve;
use caisson_protocol::{
    config::{ResolveRequest, SandboxConfig},
    containerd::{api::CreateTaskRequest, events::task::TaskOOM, topics},
    guest::{Event, EventsRequest, event::Kind},
    id::Id,
    no_deadline,
    paths::SandboxDir,
    runtimeoptions::Options,
    status::sentence,
    vmm::WaitResponse,
};
use protobuf::Message;
use tokio::{
    sync::{RwLock, watch},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tracing::{info, warn};

use crate::{
    Error, Result,
    block::{BlockStore, image_cache::remove_directory},
    bundle::{Bundle, Role},
    container::{Container, ForGuest},
    events::Publisher,
    files::{ContainerFiles, Wanted, Ways},
    guest_spec::for_guest,
    hooks::HostHooks,
    mount::unmount_below,
    process::{Exit, lock},
    record::Record,
    share,
    stages::Stages,
    vm::{Needs, REQUEST_DEADLINE, Vm},
};

/// Exit status of what ran in a virtual machine that ended.
const LOST: u32 = 255;
/// A guest's last connections break some moments before its virtual machine has ended.
const END_AFTER_EVENTS: Duration = Duration::from_secs(5);

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
    /// Where root filesystems are disks; they outlive the virtual machine.
    disks: Mutex<Option<Arc<BlockStore>>>,
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
            disks: Mutex::default(),
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
        let (spec, paths) = for_guest(bundle.spec.clone(), &id, &bundle.role()?)?;
        let wanted = Wanted { id: &id, rootfs: &request.rootfs, paths: &paths };
        let (vm, mut files) = match self.begin_boot()? {
            Some(vm) => {
                let files = self.prepare(&vm, wanted).await?;
                (vm, files)
            }
            None => self.boot(&bundle, &request, wanted, &mut stages).await.inspect_err(|_| self.boot_failed())?,
        };
        let rootfs = match files.enter(&vm).await {
            Ok(rootfs) => rootfs,
            Err(error) => {
                files.remove(Some(&vm)).await;
                return Err(error);
            }
        };
        stages.end("rootfs");

        let container =
            Arc::new(Container::new(id.clone(), &request, files, HostHooks::of(bundle.spec.hooks().as_ref())));
        lock(&self.containers).insert(id.clone(), container.clone());
        let guest = ForGuest { spec: &spec, rootfs };
        if let Err(error) = container.create(&vm, &self.publisher, request, guest).await {
            lock(&self.containers).remove(&id);
            container.remove_files(Some(&vm)).await;
            return Err(error);
        }
        stages.end("container");
        info!(container = %id, stages = stages.text(), "sandbox started");
        Ok(vm.pid)
    }

    /// Makes a further container's files ready.
    async fn prepare(&self, vm: &Vm, wanted: Wanted<'_>) -> Result<ContainerFiles> {
        let mut files = vm.ways.prepare(wanted)?;
        let disks = self.unless_stopped(files.disks()).await;
        let files = files.finish().await?;
        match disks {
            Ok(_) => Ok(files),
            Err(error) => {
                files.remove(None).await;
                Err(error)
            }
        }
    }

    /// Boots the virtual machine for the first container, whose files are made ready meanwhile.
    async fn boot(
        self: &Arc<Self>,
        bundle: &Bundle,
        request: &CreateTaskRequest,
        wanted: Wanted<'_>,
        stages: &mut Stages,
    ) -> Result<(Arc<Vm>, ContainerFiles)> {
        let config = self.configuration(bundle, request).await?;
        stages.end("config");
        let ways = Ways::of(&config, &self.dir)?;
        lock(&self.disks).clone_from(&ways.disks);
        let needs = Needs {
            hostname: bundle.spec.hostname().clone().unwrap_or_else(|| self.id.to_string()),
            memory_mib: bundle.memory_limit_mib().unwrap_or_default(),
            vcpus: bundle.vcpu_limit().unwrap_or_default(),
            more_containers: bundle.role()? == Role::PodSandbox,
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut record = Record {
            namespace: self.namespace.to_string(),
            id: self.id.to_string(),
            shim_pid: std::process::id(),
            created_unix_ms: now.as_millis() as u64,
            images: ways.disks.as_ref().map(|disks| disks.own_path()),
            ..Record::default()
        };
        let mut files = ways.prepare(wanted)?;
        let vm = Vm::boot(config, needs, &mut files, &mut record, stages, self.stop.subscribe()).await;
        // Also after a failed boot.
        let files = files.finish().await;
        let vm = Arc::new(vm?);
        *lock(&self.phase) = Phase::Running(vm.clone());
        let end = tokio::spawn(follow_end(self.clone(), vm.clone()));
        tokio::spawn(follow_events(self.clone(), vm.clone(), end));
        Ok((vm, files?))
    }

    async fn configuration(&self, bundle: &Bundle, request: &CreateTaskRequest) -> Result<SandboxConfig> {
        let question = ResolveRequest {
            config_path: config_path(request),
            annotations: bundle.annotations(),
            ..Default::default()
        };
        let resolved = async {
            let config = resolve(&question, REQUEST_DEADLINE).await;
            config.map_err(|error| Error::Remote { context: String::new(), status: error.into() })
        };
        let config = self.unless_stopped(resolved).await?;
        for warning in &config.warnings {
            warn!(file = config.origin, %warning, "an older state of the configuration is in force");
        }
        Ok(config)
    }

    async fn unless_stopped<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut stop = self.stop.subscribe();
        tokio::select! {
            done = work => done,
            _ = stop.wait_for(|stop| *stop) => Err(Error::Stopped),
        }
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

    /// All of them, in no order.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// What it has on the host.
    pub fn dir(&self) -> &SandboxDir {
        &self.dir
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
            container.remove_files(None).await;
        }
        let dir = self.dir.clone();
        // A panic there has been printed.
        let _ = spawn_blocking(move || remove(&dir)).await;
        let disks = lock(&self.disks).take();
        if let Some(disks) = disks {
            disks.end().await;
        }
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
        for container in self.containers() {
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

async fn follow_events(sandbox: Arc<Sandbox>, vm: Arc<Vm>, end: JoinHandle<()>) {
    if let Ok(mut events) = vm.guest.events(no_deadline(), &EventsRequest::new()).await {
        while let Ok(Some(event)) = events.recv().await {
            sandbox.guest_event(&vm, event);
        }
    }
    // Most often its virtual machine is ending, and says why. If not, a guest that no longer tells what happens is as good
    // as gone.
    if timeout(END_AFTER_EVENTS, end).await.is_err()
        && let Err(error) = vm.stop().await
    {
        warn!(error = sentence(&error), "a guest that tells nothing any more cannot be stopped");
    }
}

async fn follow_end(sandbox: Arc<Sandbox>, vm: Arc<Vm>) {
    let end = vm.wait().await;
    sandbox.vm_ended(&vm, &end);
}

/// Removes a sandbox's directory with all that is mounted in it. Logs what it cannot.
pub fn remove(dir: &SandboxDir) {
    let outcome = (|| {
        if let Some(images) = Record::load(dir).and_then(|record| record.images) {
            remove_directory(&images)?;
        }
        unmount_below(dir.path())?;
        let shared = dir.shared();
        if shared.exists() {
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
