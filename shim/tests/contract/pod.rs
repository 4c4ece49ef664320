//! One shim with everything around it, in a temporary folder.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use async_trait::async_trait;
use caisson_protocol::{
    config::{BlockRootfs, ResolveRequest, ResolveResponse, SandboxConfig, SharedFs, Timeouts},
    config_ttrpc::{Config, create_config},
    containerd::{
        api::{
            CloseIORequest, CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, KillRequest,
            Mount, ShutdownRequest, StartRequest, StartResponse, WaitRequest,
        },
        shim::events::ForwardRequest,
        shim_async::{Client, Events, TaskClient, create_events},
    },
    deadline,
    status::Status,
    vmm::VmConfig,
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use protobuf::MessageField;
use tokio::{
    net::{UnixStream, unix::pipe::Receiver},
    sync::Notify,
};
use ttrpc::{r#async::TtrpcContext, asynchronous::Server};

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-caisson-v2");
const LIMIT: Duration = Duration::from_secs(20);

/// What a shim is started with.
pub struct Setup<'a> {
    /// More variables of its environment, and so of the launcher's.
    pub variables: &'a [(&'a str, &'a str)],
    /// The deadline for the boot.
    pub boot_ms: u32,
    /// Whether root filesystems are disks and nothing is shared.
    pub disks: bool,
    /// What may be kept of images that nobody uses.
    pub layer_cache_mib: u64,
    /// The container's mounts, as in `config.json`.
    pub mounts: serde_json::Value,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self { variables: &[], boot_ms: 20_000, disks: false, layer_cache_mib: 100, mounts: serde_json::json!([]) }
    }
}

/// A shim that has been started, and its fake neighbours.
pub struct Pod {
    id: &'static str,
    folder: tempfile::TempDir,
    client: TaskClient,
    topics: Arc<Mutex<Vec<String>>>,
    config_asked: Arc<Notify>,
    stdin: Mutex<Option<File>>,
    journal: Mutex<BufReader<File>>,
    stdout: Mutex<mpsc::Receiver<String>>,
    stderr: Mutex<mpsc::Receiver<String>>,
    /// Ends when neither shim nor launcher holds it any more.
    log: Mutex<mpsc::Receiver<String>>,
    _servers: [Server; 2],
}

impl Pod {
    /// A shim whose guest behaves.
    pub async fn start(id: &'static str, command: &[&str]) -> Self {
        Self::start_with(id, command, Setup::default()).await
    }

    /// A shim as `setup` says.
    pub async fn start_with(id: &'static str, command: &[&str], setup: Setup<'_>) -> Self {
        let folder = tempfile::Builder::new().prefix("shim").tempdir().unwrap();
        let path = folder.path();
        for name in ["run", "bundle", "layer"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        for name in ["stdin", "stdout", "stderr", "journal", "bundle/log"] {
            mkfifo(&path.join(name), Mode::from_bits_truncate(0o600)).unwrap();
        }
        write_bundle(&path.join("bundle"), command, &setup.mounts);
        // Open for both, so that neither side waits for the other.
        let journal = OpenOptions::new().read(true).write(true).open(path.join("journal")).unwrap();
        fcntl(&journal, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let topics = Arc::new(Mutex::new(Vec::new()));
        let config_asked = Arc::new(Notify::new());
        let events_address = format!("unix://{}", path.join("events.sock").display());
        let mut events = Server::new()
            .bind(&events_address)
            .unwrap()
            .register_service(create_events(Arc::new(FakeEvents { topics: topics.clone() })));
        events.start().await.unwrap();
        let mut configuration = Server::new()
            .bind(&format!("unix://{}", path.join("run/config.sock").display()))
            .unwrap()
            .register_service(create_config(Arc::new(FakeConfig {
                asked: config_asked.clone(),
                boot_ms: setup.boot_ms,
                block_rootfs: setup.disks.then(|| block_rootfs(&path.join("cache"), setup.layer_cache_mib)),
            })));
        configuration.start().await.unwrap();

        let (stdout, stderr, log) = (read(path, "stdout"), read(path, "stderr"), read(path, "bundle/log"));
        let output = shim_command(path, id)
            .arg("start")
            .env("TTRPC_ADDRESS", &events_address)
            .env("FAKE_JOURNAL", path.join("journal"))
            .envs(setup.variables.iter().copied())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let address = String::from_utf8(output.stdout).unwrap();
        assert_eq!(fs::read_to_string(path.join("bundle/address")).unwrap(), address);
        let stream = UnixStream::connect(address.strip_prefix("unix://").unwrap()).await.unwrap();
        Self {
            id,
            client: TaskClient::new(Client::new(stream.into())),
            topics,
            config_asked,
            stdin: Mutex::new(None),
            journal: Mutex::new(BufReader::new(journal)),
            stdout: Mutex::new(stdout),
            stderr: Mutex::new(stderr),
            log: Mutex::new(log),
            _servers: [events, configuration],
            folder,
        }
    }

    pub async fn create(&self) -> ttrpc::Result<CreateTaskResponse> {
        self.create_with_rootfs(&self.file("layer")).await
    }

    pub async fn create_with_rootfs(&self, source: &str) -> ttrpc::Result<CreateTaskResponse> {
        self.create_on(bind(source, "ro")).await
    }

    pub async fn create_on(&self, rootfs: Mount) -> ttrpc::Result<CreateTaskResponse> {
        let request = CreateTaskRequest {
            id: self.id.into(),
            bundle: self.file("bundle"),
            rootfs: vec![rootfs],
            stdin: self.file("stdin"),
            stdout: self.file("stdout"),
            stderr: self.file("stderr"),
            ..Default::default()
        };
        self.client.create(deadline(LIMIT), &request).await
    }

    /// One more container in the same sandbox, whose root filesystem is `layer`, a folder of the pod's.
    pub async fn add(&self, id: &str, layer: &str) -> ttrpc::Result<CreateTaskResponse> {
        let bundle = self.folder.path().join(format!("bundle-{id}"));
        fs::create_dir_all(&bundle).unwrap();
        fs::create_dir_all(self.file(layer)).unwrap();
        write_bundle(&bundle, &["true"], &serde_json::json!([]));
        let (bundle, rootfs) = (bundle.to_str().unwrap().to_owned(), vec![bind(&self.file(layer), "ro")]);
        let request = CreateTaskRequest { id: id.into(), bundle, rootfs, ..Default::default() };
        self.client.create(deadline(LIMIT), &request).await
    }

    /// Takes such a container away.
    pub async fn remove(&self, id: &str) -> ttrpc::Result<DeleteResponse> {
        self.client.delete(deadline(LIMIT), &DeleteRequest { id: id.into(), ..Default::default() }).await
    }

    pub async fn start_container(&self) -> ttrpc::Result<StartResponse> {
        self.client.start(deadline(LIMIT), &StartRequest { id: self.id.into(), ..Default::default() }).await
    }

    pub async fn wait(&self) -> u32 {
        let request = WaitRequest { id: self.id.into(), ..Default::default() };
        self.client.wait(deadline(LIMIT), &request).await.unwrap().exit_status
    }

    pub async fn kill(&self, signal: u32) -> ttrpc::Result<Empty> {
        let request = KillRequest { id: self.id.into(), signal, ..Default::default() };
        self.client.kill(deadline(LIMIT), &request).await
    }

    pub async fn delete(&self) -> ttrpc::Result<DeleteResponse> {
        self.client.delete(deadline(LIMIT), &DeleteRequest { id: self.id.into(), ..Default::default() }).await
    }

    /// As containerd ends a shim that it needs no more; waits until shim and launcher are gone.
    pub async fn shutdown(&self) {
        self.send_shutdown(false).await;
    }

    /// Also with containers.
    pub async fn shutdown_now(&self) {
        self.send_shutdown(true).await;
    }

    async fn send_shutdown(&self, now: bool) {
        let request = ShutdownRequest { id: self.id.into(), now, ..Default::default() };
        self.client.shutdown(deadline(LIMIT), &request).await.unwrap();
        self.log_to_the_end();
    }

    pub fn write_stdin(&self, text: &str) {
        let mut fifo = OpenOptions::new().write(true).open(self.file("stdin")).unwrap();
        fifo.write_all(text.as_bytes()).unwrap();
        *self.stdin.lock().unwrap() = Some(fifo);
    }

    pub async fn close_stdin(&self) {
        self.stdin.lock().unwrap().take();
        let request = CloseIORequest { id: self.id.into(), stdin: true, ..Default::default() };
        self.client.close_io(deadline(LIMIT), &request).await.unwrap();
    }

    pub fn stdout(&self) -> String {
        self.stdout.lock().unwrap().recv_timeout(LIMIT).expect("the shim closes stdout at the deletion")
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().recv_timeout(LIMIT).expect("the shim closes stderr at the deletion")
    }

    /// What the fake told so far of disks, mounts and copies.
    pub fn journal(&self) -> Vec<String> {
        self.journal.lock().unwrap().by_ref().lines().map_while(Result::ok).collect()
    }

    /// Waits until the fake tells `line`.
    pub async fn journal_says(&self, line: &str) {
        let journal = self.journal.lock().unwrap().get_ref().try_clone().unwrap();
        let receiver = Receiver::from_file(journal).unwrap();
        let told = async {
            while !self.journal().iter().any(|told| told == line) {
                receiver.readable().await.unwrap();
            }
        };
        tokio::time::timeout(LIMIT, told).await.unwrap_or_else(|_| panic!("the fake does not tell \"{line}\""));
    }

    /// Names of what is in the cache of images.
    pub fn cached(&self) -> Vec<String> {
        let entries = fs::read_dir(self.file("cache")).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Topics of all events so far, in order.
    pub fn topics(&self) -> Vec<String> {
        self.topics.lock().unwrap().clone()
    }

    /// Waits until the sandbox's boot is under way.
    pub async fn launcher_started(&self) {
        self.config_asked.notified().await;
    }

    pub fn kill_shim(&self) {
        self.kill_recorded("shim_pid");
    }

    pub fn kill_launcher(&self) {
        self.kill_recorded("launcher_pid");
    }

    /// Runs the clean-up that containerd runs for a dead shim.
    pub fn run_delete(&self, limit: Duration) {
        let output = shim_command(self.folder.path(), self.id).arg("delete").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.log.lock().unwrap().recv_timeout(limit).expect("shim and launcher are gone");
    }

    /// No directory, mount or process of the sandbox is left.
    pub fn assert_nothing_left(&self) {
        let folder = self.folder.path().to_str().unwrap();
        let sandboxes: Vec<PathBuf> =
            fs::read_dir(self.file("run/sandboxes")).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(sandboxes.is_empty(), "left: {sandboxes:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(folder), "left mounted: {mounts}");
        let mine = format!("CAISSON_RUN_DIR={folder}");
        let processes: Vec<PathBuf> = fs::read_dir("/proc")
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|process| {
                let environment = fs::read(process.join("environ")).unwrap_or_default();
                String::from_utf8_lossy(&environment).contains(&mine)
            })
            .collect();
        assert!(processes.is_empty(), "left running: {processes:?}");
    }

    fn log_to_the_end(&self) -> String {
        self.log.lock().unwrap().recv_timeout(LIMIT).expect("shim and launcher end after Shutdown")
    }

    fn kill_recorded(&self, field: &str) {
        let sandbox = fs::read_dir(self.file("run/sandboxes")).unwrap().next().unwrap().unwrap().path();
        let record: serde_json::Value =
            serde_json::from_slice(&fs::read(sandbox.join("sandbox.json")).unwrap()).unwrap();
        kill(Pid::from_raw(record[field].as_i64().unwrap() as i32), Signal::SIGKILL).unwrap();
    }

    /// A file in the pod's folder.
    pub fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

/// The refusal that a call was expected to end with.
pub fn status<T>(outcome: ttrpc::Result<T>) -> Status {
    Status::from(outcome.err().expect("the call is refused"))
}

fn shim_command(folder: &Path, id: &str) -> Command {
    let launchers = Path::new(SHIM).with_file_name("examples");
    let mut command = Command::new(SHIM);
    command
        .args(["-namespace", "test", "-address", "/nowhere", "-id", id])
        .current_dir(folder.join("bundle"))
        .env("CAISSON_RUN_DIR", folder.join("run"))
        .env("PATH", format!("{}:{}", launchers.display(), std::env::var("PATH").unwrap()))
        .stdin(Stdio::null());
    command
}

fn write_bundle(bundle: &Path, command: &[&str], mounts: &serde_json::Value) {
    let process = serde_json::json!({"args": command, "cwd": "/", "user": {"uid": 0, "gid": 0}});
    let config = serde_json::json!(
        {"ociVersion": "1.0.2", "process": process, "root": {"path": "rootfs"}, "mounts": mounts});
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
}

/// As containerd describes a snapshot of one layer.
pub fn bind(source: &str, access: &str) -> Mount {
    Mount {
        type_: "bind".into(),
        source: source.into(),
        options: vec!["rbind".into(), access.into()],
        ..Default::default()
    }
}

/// Reads a fifo to its end in a thread.
fn read(folder: &Path, name: &str) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    let path = folder.join(name);
    thread::spawn(move || {
        let mut text = String::new();
        File::open(path).unwrap().read_to_string(&mut text).unwrap();
        let _ = sender.send(text);
    });
    receiver
}

struct FakeEvents {
    topics: Arc<Mutex<Vec<String>>>,
}

#[async_trait]
impl Events for FakeEvents {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        assert_eq!(envelope.namespace, "test");
        self.topics.lock().unwrap().push(envelope.topic);
        Ok(Empty::new())
    }
}

struct FakeConfig {
    asked: Arc<Notify>,
    boot_ms: u32,
    /// `None`: everything is shared.
    block_rootfs: Option<BlockRootfs>,
}

#[async_trait]
impl Config for FakeConfig {
    async fn resolve(&self, _: &TtrpcContext, _: ResolveRequest) -> ttrpc::Result<ResolveResponse> {
        self.asked.notify_one();
        let config = SandboxConfig {
            hypervisor: "fake".into(),
            vm: MessageField::some(VmConfig { kernel: SHIM.into(), memory_mib: 64, vcpus: 1, ..Default::default() }),
            timeouts: MessageField::some(Timeouts {
                create_ms: 10_000,
                boot_ms: self.boot_ms,
                request_ms: 10_000,
                ..Default::default()
            }),
            log_level: "info".into(),
            shared_fs: self.block_rootfs.is_none().then(SharedFs::new).into(),
            block_rootfs: self.block_rootfs.clone().into(),
            ..Default::default()
        };
        Ok(ResolveResponse { config: MessageField::some(config), ..Default::default() })
    }
}

fn block_rootfs(cache: &Path, layer_cache_mib: u64) -> BlockRootfs {
    let layer_cache_path = cache.to_str().unwrap().to_owned();
    BlockRootfs { layer_cache_path, layer_cache_mib, max_disks: 4, ..Default::default() }
}
