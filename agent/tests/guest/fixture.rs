//! A guest that runs this agent: QEMU without KVM, and the two clients that a shim has.

use std::{
    env, fs, io,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use caisson_protocol::{
    address::GuestVsock,
    containerd::{
        api::{
            CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, Mount, StartRequest,
            WaitRequest,
        },
        shim_async::TaskClient,
    },
    guest::CopyFileRequest,
    guest_ttrpc::GuestClient,
};
use caisson_vmm_launcher::vsock::VsockBackend;
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, sync::watch, task::JoinHandle, time::timeout};
use ttrpc::context::{Context, with_duration};

/// What QEMU needs on this machine to boot, and a container to end.
const LIMIT: Duration = Duration::from_secs(60);

const BUSYBOX: &str = "/bin/busybox";
/// The names under which busybox is in a container.
const APPLETS: [&str; 3] = ["busybox", "sh", "cat"];

pub fn limit() -> Context {
    with_duration(LIMIT)
}

/// The guest's network device.
pub const MAC: &str = "02:00:00:00:00:01";
/// The guest's disk: an EROFS image with busybox in it.
pub const DISK_SERIAL: &str = "layer-1";

/// A running guest.
pub struct Guest {
    pub tasks: TaskClient,
    pub guest: GuestClient,
    vsock: GuestVsock,
    qemu: Child,
    _backend: VsockBackend,
    dir: TempDir,
}

impl Guest {
    /// Boots `vmlinux` with `initrd.img`, or with `rootfs.erofs` where there is none.
    pub async fn boot() -> Self {
        let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/release/guest");
        let images = env::var("CAISSON_TEST_GUEST").unwrap_or_else(|_| built.into());
        assert!(Path::new(&images).is_dir(), "no guest images in {images}: run `cargo xtask setup` first");
        let dir = tempfile::tempdir().unwrap();
        let (socket, vhost_user) = (dir.path().join("v"), dir.path().join("u"));
        let backend = VsockBackend::start(UnixListener::bind(&vhost_user).unwrap(), &socket, 3).unwrap();
        make_disk(dir.path()).unwrap();
        let vsock: GuestVsock = format!("hvsock:{}", socket.display()).parse().unwrap();
        let listener = vsock.listen_for_agent().unwrap();
        let qemu = qemu(Path::new(&images), &vhost_user, dir.path()).unwrap();
        let connection = match timeout(LIMIT, listener.accept()).await {
            Ok(connection) => connection.unwrap(),
            Err(_) => panic!("the guest did not call:\n{}", console(dir.path())),
        };
        let client = ttrpc::asynchronous::Client::new(connection.into_ttrpc());
        let (tasks, guest) = (TaskClient::new(client.clone()), GuestClient::new(client));
        Self { tasks, guest, vsock, qemu, _backend: backend, dir }
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> String {
        console(self.dir.path())
    }

    /// Waits until the machine has ended by itself.
    pub async fn ended(mut self) {
        self.wait_for_end().await;
    }

    /// Hangs up, and waits until the machine has ended by itself.
    pub async fn ended_without_host(mut self) {
        // A connection lives as long as its clients.
        let (near, _far) = tokio::net::UnixStream::pair().unwrap();
        let client = ttrpc::asynchronous::Client::new(near.into());
        (self.tasks, self.guest) = (TaskClient::new(client.clone()), GuestClient::new(client));
        self.wait_for_end().await;
    }

    async fn wait_for_end(&mut self) {
        let mut qemu = std::mem::replace(&mut self.qemu, Command::new("true").spawn().unwrap());
        let ended = tokio::task::spawn_blocking(move || qemu.wait());
        timeout(LIMIT, ended).await.expect("the guest ends").unwrap().unwrap();
    }

    /// Writes a file in the guest.
    pub async fn write(&self, path: &str, mode: u32, data: &[u8]) {
        let request = CopyFileRequest { path: path.into(), mode, data: data.to_vec(), ..Default::default() };
        self.guest.copy_file(limit(), &request).await.unwrap();
    }

    /// Makes container `id` from busybox and `config`, and listens to what it says.
    pub async fn create(&self, id: &str, config: &Value) -> Result<Task<'_>, ttrpc::Error> {
        self.create_as(id, config, CreateTaskRequest::default()).await
    }

    /// The same, with an input that the test has.
    pub async fn create_with_stdin(&self, id: &str, config: &Value, stdin: String) -> Result<Task<'_>, ttrpc::Error> {
        self.create_as(id, config, CreateTaskRequest { stdin, ..Default::default() }).await
    }

    /// The same, with an output that the test reads itself.
    pub async fn create_with_stdout(&self, id: &str, config: &Value, stdout: String) -> Result<Task<'_>, ttrpc::Error> {
        self.create_as(id, config, CreateTaskRequest { stdout, ..Default::default() }).await
    }

    async fn create_as(
        &self,
        id: &str,
        config: &Value,
        mut request: CreateTaskRequest,
    ) -> Result<Task<'_>, ttrpc::Error> {
        let has_rootfs = !request.rootfs.is_empty();
        request.bundle = self.bundle(id, config, !has_rootfs).await;
        request.id = id.into();
        request.terminal = config["process"]["terminal"] == true;
        let (stdout, stderr) = (self.listen(), self.listen());
        if request.stdout.is_empty() {
            request.stdout = stdout.address.clone();
        }
        if !request.terminal {
            request.stderr = stderr.address.clone();
        }
        self.tasks.create(limit(), &request).await?;
        Ok(Task { guest: self, id: id.into(), exec_id: String::new(), stdout, stderr })
    }

    /// Runs a container on `rootfs` to its end.
    pub async fn run_on(&self, id: &str, config: &Value, rootfs: Vec<Mount>) -> Outcome {
        let request = CreateTaskRequest { rootfs, ..Default::default() };
        let task = self.create_as(id, config, request).await.unwrap();
        task.start().await.unwrap();
        task.end().await
    }

    /// Waits until `task` has said `text`.
    pub async fn until_heard(&self, task: &Task<'_>, text: &str) {
        let mut heard = task.stdout.heard.subscribe();
        let said = timeout(LIMIT, heard.wait_for(|heard| heard.contains(text))).await;
        said.expect("the container says it").unwrap();
    }

    async fn bundle(&self, id: &str, config: &Value, with_busybox: bool) -> String {
        let bundle = format!("/run/caisson/bundles/{id}");
        self.write(&format!("{bundle}/config.json"), 0o644, config.to_string().as_bytes()).await;
        if with_busybox {
            let busybox = fs::read(BUSYBOX).unwrap();
            for name in APPLETS {
                self.write(&format!("{bundle}/rootfs/bin/{name}"), 0o755, &busybox).await;
            }
        }
        bundle
    }

    /// Adds a process to container `id`.
    pub async fn exec(&self, id: &str, exec_id: &str, process: &Value) -> Result<Task<'_>, ttrpc::Error> {
        let (stdout, stderr) = (self.listen(), self.listen());
        let terminal = process["terminal"] == true;
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            terminal,
            stdout: stdout.address.clone(),
            stderr: if terminal { String::new() } else { stderr.address.clone() },
            spec: MessageField::some(Any { value: process.to_string().into_bytes(), ..Default::default() }),
            ..Default::default()
        };
        self.tasks.exec(limit(), &request).await?;
        Ok(Task { guest: self, id: id.into(), exec_id: exec_id.into(), stdout, stderr })
    }

    /// Listens to one stream of the guest.
    fn listen(&self) -> Heard {
        let listener = self.vsock.listen_for_stream().unwrap();
        let address = listener.address().to_string();
        let heard = watch::Sender::new(String::new());
        let hearing = heard.clone();
        let end = tokio::spawn(async move {
            let mut stream = listener.accept().await.unwrap().into_ttrpc();
            let mut chunk = [0; 64 * 1024];
            loop {
                let count = stream.read(&mut chunk).await.unwrap();
                if count == 0 {
                    return;
                }
                hearing.send_modify(|heard| heard.push_str(&String::from_utf8_lossy(&chunk[..count])));
            }
        });
        Heard { address, heard, end }
    }

    /// A listener for a stream that the test itself handles.
    pub fn listener(&self) -> caisson_protocol::address::GuestListener {
        self.vsock.listen_for_stream().unwrap()
    }

    /// Runs a container to its end.
    pub async fn run(&self, id: &str, config: &Value) -> Outcome {
        let task = self.create(id, config).await.unwrap();
        task.start().await.unwrap();
        task.end().await
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            eprintln!("--- the guest's console ---\n{}", self.console());
        }
    }
}

/// A container or one of its processes.
pub struct Task<'a> {
    guest: &'a Guest,
    pub id: String,
    pub exec_id: String,
    stdout: Heard,
    stderr: Heard,
}

/// What was said on one stream so far.
struct Heard {
    address: String,
    heard: watch::Sender<String>,
    end: JoinHandle<()>,
}

impl Heard {
    /// All of it; a stream that nobody opened says nothing.
    async fn whole(self) -> String {
        let _ = timeout(Duration::from_secs(2), self.end).await;
        self.heard.borrow().clone()
    }
}

/// How a process ended, and what it said.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

impl Task<'_> {
    pub async fn start(&self) -> ttrpc::Result<u32> {
        let request = StartRequest { id: self.id.clone(), exec_id: self.exec_id.clone(), ..Default::default() };
        Ok(self.guest.tasks.start(limit(), &request).await?.pid)
    }

    pub async fn wait(&self) -> u32 {
        let request = WaitRequest { id: self.id.clone(), exec_id: self.exec_id.clone(), ..Default::default() };
        self.guest.tasks.wait(limit(), &request).await.unwrap().exit_status
    }

    pub async fn kill(&self, signal: u32) -> ttrpc::Result<()> {
        let (id, exec_id) = (self.id.clone(), self.exec_id.clone());
        let request = KillRequest { id, exec_id, signal, ..Default::default() };
        self.guest.tasks.kill(limit(), &request).await.map(drop)
    }

    pub async fn delete(&self) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest { id: self.id.clone(), exec_id: self.exec_id.clone(), ..Default::default() };
        self.guest.tasks.delete(limit(), &request).await
    }

    /// Waits for the end, deletes, and gathers what was said.
    pub async fn end(self) -> Outcome {
        let status = self.wait().await;
        assert_eq!(self.delete().await.unwrap().exit_status, status);
        Outcome { status, stdout: self.stdout.whole().await, stderr: self.stderr.whole().await }
    }
}

/// A configuration as containerd writes it for `ctr run`, with `args`.
pub fn config(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0, "additionalGids": [0, 10] },
            "args": args,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "GREETING=hello"],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs" },
        "hostname": "box",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
              "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
              "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }], "pids": { "limit": 100 } },
            "cgroupsPath": "/default/web",
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" }
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// A configuration that runs `script`.
pub fn script(script: &str) -> Value {
    config(&["sh", "-c", script])
}

fn qemu(images: &Path, vhost_user: &Path, dir: &Path) -> io::Result<Child> {
    // A guest that measures its clock against emulated timers gets it wrong on a busy machine.
    let clock = format!("no_timer_check tsc=reliable tsc_early_khz={}", tsc_khz());
    let mut qemu = Command::new("qemu-system-x86_64");
    let initrd = images.join("initrd.img");
    let root = if initrd.exists() {
        qemu.arg("-initrd").arg(initrd);
        ""
    } else {
        let image = images.join("rootfs.erofs");
        qemu.args(["-device", "virtio-blk-device,drive=root,serial=root", "-blockdev"])
            .arg(format!("driver=raw,node-name=root,read-only=on,file.driver=file,file.filename={}", image.display()));
        "root=/dev/vda ro rootfstype=erofs"
    };
    qemu.args(["-M", "microvm,acpi=on,rtc=on,isa-serial=on,memory-backend=mem0", "-accel", "tcg,thread=multi"])
        .args(["-cpu", "max,la57=off", "-smp", "1", "-m", "512M"])
        .args(["-no-reboot", "-nodefaults", "-no-user-config", "-nographic"])
        .args(["-object", "memory-backend-memfd,id=mem0,size=512M,share=on"])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .arg("-chardev")
        .arg(format!("socket,id=vs,path={}", vhost_user.display()))
        .args(["-device", "vhost-user-vsock-device,chardev=vs", "-device", "virtio-rng-device"])
        .args(["-netdev", "user,id=net,restrict=on", "-device"])
        .arg(format!("virtio-net-device,netdev=net,mac={MAC}"))
        .arg("-blockdev")
        .arg(format!("driver=raw,node-name=disk,read-only=on,file.driver=file,file.filename={}", disk(dir).display()))
        .arg("-device")
        .arg(format!("virtio-blk-device,drive=disk,serial={DISK_SERIAL}"))
        .arg("-kernel")
        .arg(images.join("vmlinux"))
        .arg("-append")
        .arg(format!("console=ttyS0 quiet panic=-1 reboot=t {clock} {root} caisson.log=debug caisson.console=1"))
        .arg("-serial")
        .arg(format!("file:{}", dir.join("console").display()))
        .stdin(Stdio::null())
        .spawn()
}

fn disk(dir: &Path) -> PathBuf {
    dir.join("disk")
}

fn make_disk(dir: &Path) -> io::Result<()> {
    let root = dir.join("root/bin");
    fs::create_dir_all(&root)?;
    for name in APPLETS {
        fs::copy(BUSYBOX, root.join(name))?;
    }
    let made = Command::new("mkfs.erofs").arg(disk(dir)).arg(dir.join("root")).stdout(Stdio::null()).status()?;
    assert!(made.success());
    Ok(())
}

fn tsc_khz() -> u64 {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = text.lines().find_map(|line| line.strip_prefix("cpu MHz")).unwrap().trim_start_matches(['\t', ' ', ':']);
    (mhz.parse::<f64>().unwrap() * 1000.0) as u64
}

fn console(dir: &Path) -> String {
    fs::read_to_string(dir.join("console")).unwrap_or_default()
}
