//! A launcher, a virtual machine and an agent in one process, for the shim's contract tests.
//!
//! It speaks the contracts as the real ones do and refuses what they refuse: wrong order, unknown names, missing files.
//! A container's command runs as a plain process of the host. `$FAKE_GUEST` asks for a guest that misbehaves:
//! `panics` ends the VM at boot, `silent` never calls the host. `$FAKE_HOTPLUG` set to `none` is a VM that takes no disks
//! while it runs. The first file with the content `$FAKE_REFUSES` cannot be copied. What happens to disks, mounts and
//! copies is told to `$FAKE_JOURNAL`, a pipe, one line each.

use std::{
    collections::{HashMap, HashSet},
    env, fs,
    io::Write,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use caisson_protocol::{
    containerd::{
        api::{
            CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, KillRequest, StartRequest,
            StartResponse,
        },
        shim_async::{Task, create_task},
    },
    guest::{
        AddStorageRequest, AddStorageResponse, CopyFileRequest, CopyFileResponse, Event, EventsRequest, FileKind,
        ProcessExited, RemoveStorageRequest, RemoveStorageResponse, SetupRequest, SetupResponse, event::Kind,
    },
    guest_ttrpc::{Guest, create_guest},
    listen,
    status::{Code, Status},
    vmm::{
        AttachRequest, AttachResponse, BootRequest, BootResponse, CreateRequest, CreateResponse, DetachRequest,
        DetachResponse, Device, ExitReason, GuestDevice, StateRequest, StateResponse, StopRequest, StopResponse,
        WaitRequest, WaitResponse, device,
    },
    vmm_ttrpc::{Vmm, create_vmm},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use ttrpc::{
    r#async::TtrpcContext,
    asynchronous::{Server, ServerStreamSender, transport::Listener},
};

const CONSOLE: &str = "[    0.1] Kernel panic - not syncing: Attempted to kill init!";

#[tokio::main(flavor = "current_thread")]
async fn main() {
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).expect("ask for a signal at the parent's death");
    let mut terminated = signal(SignalKind::terminate()).expect("wait for SIGTERM");
    let launcher = Arc::new(Launcher { vsock: Mutex::new(None), disks: Arc::default(), end: watch::Sender::new(None) });
    let listener = listen::inherited().expect("standard input is a socket");
    let mut server = Server::new().add_listener(listener).register_service(create_vmm(launcher));
    server.start().await.expect("serve");
    terminated.recv().await;
}

/// The ids of the disks that the VM has.
type Disks = Arc<Mutex<HashSet<String>>>;

struct Launcher {
    vsock: Mutex<Option<PathBuf>>,
    disks: Disks,
    end: watch::Sender<Option<(ExitReason, &'static str)>>,
}

/// One write per line, so that lines stay whole.
fn tell(line: String) {
    if let Some(journal) = env::var_os("FAKE_JOURNAL") {
        let mut journal = fs::File::options().append(true).open(journal).expect("open the journal");
        journal.write_all(format!("{line}\n").as_bytes()).expect("write the journal");
    }
}

impl Launcher {
    /// Where the guest finds the disk.
    fn add_disk(&self, device: &Device) -> ttrpc::Result<String> {
        let Some(device::Kind::Block(block)) = &device.kind else {
            return refuse(Code::INVALID_ARGUMENT, "not a disk");
        };
        if !PathBuf::from(&block.path).is_file() {
            return refuse(Code::INVALID_ARGUMENT, &format!("disk {} does not exist", block.path));
        }
        if !self.disks.lock().unwrap().insert(device.id.clone()) {
            return refuse(Code::INVALID_ARGUMENT, &format!("there is a disk {} already", device.id));
        }
        Ok(format!("serial:{}", device.id))
    }
}

fn refuse<T>(code: Code, message: &str) -> ttrpc::Result<T> {
    Err(Status::new(code, message).into())
}

#[async_trait]
impl Vmm for Launcher {
    async fn create(&self, _: &TtrpcContext, request: CreateRequest) -> ttrpc::Result<CreateResponse> {
        let vm = request.vm.unwrap_or_default();
        if !PathBuf::from(&request.run_dir).is_dir() {
            return refuse(Code::INVALID_ARGUMENT, "run_dir does not exist");
        }
        if !PathBuf::from(&vm.kernel).is_file() {
            return refuse(Code::INVALID_ARGUMENT, &format!("kernel {} does not exist", vm.kernel));
        }
        let mut devices = Vec::new();
        for device in &vm.devices {
            let address = match &device.kind {
                Some(device::Kind::Vsock(vsock)) => {
                    *self.vsock.lock().unwrap() = Some(vsock.socket.clone().into());
                    format!("hvsock:{}", vsock.socket)
                }
                Some(device::Kind::Fs(fs)) if !PathBuf::from(&fs.shared_dir).is_dir() => {
                    return refuse(Code::INVALID_ARGUMENT, "shared_dir does not exist");
                }
                Some(device::Kind::Block(_)) => {
                    tell(format!("born with {}", device.id));
                    self.add_disk(device)?
                }
                _ => String::new(),
            };
            devices.push(GuestDevice { id: device.id.clone(), address, ..Default::default() });
        }
        Ok(CreateResponse { devices, pid: std::process::id(), ..Default::default() })
    }

    async fn boot(&self, _: &TtrpcContext, _: BootRequest) -> ttrpc::Result<BootResponse> {
        let Some(vsock) = self.vsock.lock().unwrap().clone() else {
            return refuse(Code::FAILED_PRECONDITION, "cannot boot a VM that is empty");
        };
        match env::var("FAKE_GUEST").as_deref() {
            Ok("panics") => drop(self.end.send_replace(Some((ExitReason::GUEST_PANIC, "the guest kernel panicked")))),
            Ok("silent") => {}
            _ => drop(tokio::spawn(serve_guest(vsock, self.disks.clone(), self.end.clone()))),
        }
        Ok(BootResponse::new())
    }

    async fn wait(&self, _: &TtrpcContext, _: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let mut end = self.end.subscribe();
        let (reason, detail) = end.wait_for(Option::is_some).await.map(|end| end.unwrap()).unwrap();
        Ok(WaitResponse {
            reason: reason.into(),
            detail: detail.into(),
            console_tail: CONSOLE.into(),
            ..Default::default()
        })
    }

    async fn stop(&self, _: &TtrpcContext, _: StopRequest) -> ttrpc::Result<StopResponse> {
        self.end.send_replace(Some((ExitReason::STOPPED, "stopped")));
        Ok(StopResponse::new())
    }

    async fn attach(&self, _: &TtrpcContext, request: AttachRequest) -> ttrpc::Result<AttachResponse> {
        if env::var("FAKE_HOTPLUG").as_deref() == Ok("none") {
            return refuse(Code::UNIMPLEMENTED, "attaching a block device is not supported with fake");
        }
        let device = request.device.unwrap_or_default();
        let (id, address) = (device.id.clone(), self.add_disk(&device)?);
        tell(format!("attached {id}"));
        let device = GuestDevice { id, address, ..Default::default() };
        Ok(AttachResponse { device: Some(device).into(), ..Default::default() })
    }

    async fn detach(&self, _: &TtrpcContext, request: DetachRequest) -> ttrpc::Result<DetachResponse> {
        if !self.disks.lock().unwrap().remove(&request.id) {
            return refuse(Code::INVALID_ARGUMENT, &format!("no device was attached as {}", request.id));
        }
        tell(format!("detached {}", request.id));
        Ok(DetachResponse::new())
    }

    async fn state(&self, _: &TtrpcContext, _: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(StateResponse { console_tail: CONSOLE.into(), ..Default::default() })
    }
}

/// Dials the host, as the agent does, and serves it until the connection ends.
async fn serve_guest(vsock: PathBuf, disks: Disks, end: watch::Sender<Option<(ExitReason, &'static str)>>) {
    let call = UnixStream::connect(format!("{}_1024", vsock.display())).await.expect("the host listens for the agent");
    let (events, queue) = mpsc::unbounded_channel();
    let agent = Arc::new(Agent {
        root: vsock.with_file_name("fake-guest"),
        vsock,
        events,
        queue: tokio::sync::Mutex::new(queue),
        tasks: Mutex::default(),
        disks,
        mounts: Mutex::default(),
        has_refused: AtomicBool::default(),
    });
    let connection = futures_util::stream::iter([Ok::<_, std::io::Error>(call)]);
    let mut server = Server::new()
        .add_listener(Listener::new(connection))
        .register_service(create_guest(agent.clone()))
        .register_service(create_task(agent));
    server.start().await.expect("serve the host");
    let mut ends = end.subscribe();
    let _ = ends.wait_for(Option::is_some).await;
    let _ = server.shutdown().await;
}

struct Agent {
    root: PathBuf,
    vsock: PathBuf,
    events: mpsc::UnboundedSender<Event>,
    queue: tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>,
    tasks: Mutex<HashMap<String, FakeTask>>,
    disks: Disks,
    /// In the order in which they were made.
    mounts: Mutex<Vec<String>>,
    has_refused: AtomicBool,
}

struct FakeTask {
    command: Vec<String>,
    streams: [Option<UnixStream>; 3],
    pid: Option<u32>,
}

impl Agent {
    async fn dial(&self, address: &str) -> ttrpc::Result<Option<UnixStream>> {
        if address.is_empty() {
            return Ok(None);
        }
        let Some(port) = address.strip_prefix("vsock:2:") else {
            return refuse(Code::INVALID_ARGUMENT, &format!("{address} is not an address of the host"));
        };
        let stream = UnixStream::connect(format!("{}_{port}", self.vsock.display())).await;
        stream.map(Some).map_err(|error| Status::of(Code::UNAVAILABLE, &error).into())
    }
}

#[async_trait]
impl Guest for Agent {
    async fn setup(&self, _: &TtrpcContext, _: SetupRequest) -> ttrpc::Result<SetupResponse> {
        Ok(SetupResponse::new())
    }

    async fn copy_file(&self, _: &TtrpcContext, request: CopyFileRequest) -> ttrpc::Result<CopyFileResponse> {
        let Some(inside) = request.path.strip_prefix("/run/caisson/") else {
            return refuse(Code::INVALID_ARGUMENT, "the path is not below /run/caisson");
        };
        let text = String::from_utf8_lossy(&request.data);
        if env::var("FAKE_REFUSES").as_deref() == Ok(&text) && !self.has_refused.swap(true, Ordering::Relaxed) {
            tell(format!("refused {inside}"));
            return refuse(Code::UNAVAILABLE, "the guest has no room");
        }
        let path = self.root.join(inside);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match request.kind.unwrap() {
            FileKind::REGULAR_FILE => fs::write(path, &request.data),
            FileKind::DIRECTORY | FileKind::NEW_DIRECTORY => fs::create_dir_all(path),
            FileKind::SYMBOLIC_LINK => std::os::unix::fs::symlink(text.as_ref(), path),
            FileKind::NOTHING => fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path)).or(Ok(())),
        }
        .unwrap();
        if inside.starts_with("shared/") {
            tell(format!("{:?} {inside} {}", request.kind.unwrap(), text.trim_end()));
        }
        Ok(CopyFileResponse::new())
    }

    async fn add_storage(&self, _: &TtrpcContext, request: AddStorageRequest) -> ttrpc::Result<AddStorageResponse> {
        let storage = request.storage.unwrap_or_default();
        let mounts = &mut *self.mounts.lock().unwrap();
        if let Some(serial) = storage.source.strip_prefix("serial:")
            && !self.disks.lock().unwrap().contains(serial)
        {
            return refuse(Code::NOT_FOUND, &format!("disk {serial} did not appear"));
        }
        let lower = storage.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
        if let Some(missing) =
            lower.and_then(|lower| lower.split(':').find(|layer| !mounts.iter().any(|at| at == layer)))
        {
            return refuse(Code::INVALID_ARGUMENT, &format!("nothing is mounted at {missing}"));
        }
        tell(format!("{} {} at {}", storage.driver, storage.source, storage.mount_point));
        mounts.push(storage.mount_point);
        Ok(AddStorageResponse::new())
    }

    async fn remove_storage(
        &self,
        _: &TtrpcContext,
        request: RemoveStorageRequest,
    ) -> ttrpc::Result<RemoveStorageResponse> {
        let removed = PathBuf::from(&request.mount_point);
        self.mounts.lock().unwrap().retain(|mount| !PathBuf::from(mount).starts_with(&removed));
        Ok(RemoveStorageResponse::new())
    }

    async fn events(&self, _: &TtrpcContext, _: EventsRequest, stream: ServerStreamSender<Event>) -> ttrpc::Result<()> {
        let mut queue = self.queue.lock().await;
        while let Some(event) = queue.recv().await {
            stream.send(&event).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Task for Agent {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let config = self.root.join(format!("bundles/{}/config.json", request.id));
        let Ok(config) = fs::read(&config) else { return refuse(Code::NOT_FOUND, "the bundle has no config.json") };
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&config).unwrap();
        let root = request.rootfs.first().map(|mount| mount.source.clone()).unwrap_or_default();
        if root.starts_with("/run/caisson/rootfs/") && !self.mounts.lock().unwrap().contains(&root) {
            return refuse(Code::NOT_FOUND, &format!("there is no root filesystem at {root}"));
        }
        let streams =
            [self.dial(&request.stdin).await?, self.dial(&request.stdout).await?, self.dial(&request.stderr).await?];
        let command = spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default();
        self.tasks.lock().unwrap().insert(request.id, FakeTask { command, streams, pid: None });
        Ok(CreateTaskResponse { pid: 2, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let child: Child = {
            let mut tasks = self.tasks.lock().unwrap();
            let Some(task) = tasks.get_mut(&request.id) else { return refuse(Code::NOT_FOUND, "no such container") };
            let [stdin, stdout, stderr] = std::mem::take(&mut task.streams).map(|stream| {
                stream.map_or_else(Stdio::null, |stream| {
                    let stream = stream.into_std().unwrap();
                    stream.set_nonblocking(false).unwrap();
                    Stdio::from(std::os::fd::OwnedFd::from(stream))
                })
            });
            // What runs in a virtual machine goes with it, also when it has gone before the command ran.
            let mut command = Command::new("setpriv");
            command
                .args(["--pdeathsig", "KILL", "--", "sh", "-c", r#"[ "$PPID" = "$0" ] && exec "$@""#])
                .arg(std::process::id().to_string())
                .args(&task.command);
            let child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn();
            let child = child.map_err(|error| ttrpc::Error::from(Status::of(Code::UNKNOWN, &error)))?;
            task.pid = child.id();
            child
        };
        let (pid, events, container_id) = (child.id().unwrap_or_default(), self.events.clone(), request.id);
        tokio::spawn(report_exit(child, pid, events, container_id));
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let pid = self.tasks.lock().unwrap().get(&request.id).and_then(|task| task.pid);
        let Some(pid) = pid else { return refuse(Code::NOT_FOUND, "process already finished") };
        kill(Pid::from_raw(pid as i32), Signal::try_from(request.signal as i32).unwrap()).unwrap();
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        match self.tasks.lock().unwrap().remove(&request.id) {
            Some(_) => Ok(DeleteResponse::new()),
            None => refuse(Code::NOT_FOUND, "no such container"),
        }
    }
}

async fn report_exit(mut child: Child, pid: u32, events: mpsc::UnboundedSender<Event>, container_id: String) {
    let status = child.wait().await.unwrap();
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    let exited = ProcessExited {
        container_id,
        pid,
        status: code as u32,
        exited_unix_ns: 1_700_000_000_000_000_000,
        ..Default::default()
    };
    let _ = events.send(Event { kind: Some(Kind::ProcessExited(exited)), ..Default::default() });
}
