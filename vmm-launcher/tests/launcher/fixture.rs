//! A launcher process with a client, and a guest whose whole user space is a shell script.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use caisson_protocol::{
    deadline, listen, no_deadline,
    status::Status,
    vmm::{self, CreateRequest, CreateResponse, Device, VmConfig, WaitResponse, device::Kind},
    vmm_ttrpc::VmmClient,
};
use caisson_testbed::Installation;
use tempfile::TempDir;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::timeout,
};
use ttrpc::asynchronous::Client;

pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";
pub const LAUNCHER: &str = env!("CARGO_BIN_EXE_caisson-vmm-qemu");
/// For anything that a guest does, emulated on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Ends as the kernel parameter `do=` says.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /sys /dev /mnt
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "$module"; done < /lib/modules/order
echo "guest: up"
case "$(cat /proc/cmdline)" in
*do=poweroff*) poweroff -f ;;
*do=reboot*) reboot -f ;;
*do=panic*) echo c > /proc/sysrq-trigger ;;
*do=list*)
    for disk in /sys/block/vd*; do echo "guest: ${disk##*/} is $(cat $disk/serial) read-only $(cat $disk/ro)"; done
    for card in /sys/class/net/e*; do echo "guest: card $(cat $card/address)"; done
    mount -t virtiofs share /mnt && echo "guest: shared $(cat /mnt/hello)" && echo written > /mnt/answer
    poweroff -f ;;
*do=watch*)
    seen=none
    while :; do
        now=$(echo /sys/block/vd*/serial)
        [ "$now" = "$seen" ] || { echo "guest: disks $(cat $now 2>/dev/null)"; seen=$now; }
        usleep 100000
    done ;;
*do=echo*) read -r line; echo "guest: heard $line"; poweroff -f ;;
esac
while :; do sleep 1000; done
"#;

/// What guests boot.
pub struct Images {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub virtiofsd: PathBuf,
    pub dir: TempDir,
}

impl Images {
    /// None, with a word about it, where there is nothing to boot.
    pub fn find() -> Option<Self> {
        let installation = Installation::find();
        let setting = |name| env::var_os(name).map(PathBuf::from);
        let kernel = setting("CAISSON_TEST_KERNEL").or(installation.as_ref().ok().map(|found| found.kernel.clone()));
        let initrd = setting("CAISSON_TEST_INITRD").or(installation.as_ref().ok().map(|found| found.initrd.clone()));
        let (Some(kernel), Some(base)) = (kernel, initrd) else {
            eprintln!(
                "skipped: no guest to boot; run `cargo xtask setup` or set CAISSON_TEST_KERNEL and CAISSON_TEST_INITRD"
            );
            return None;
        };
        let virtiofsd = installation.map_or_else(|_| "/usr/libexec/virtiofsd".into(), |found| found.virtiofsd);
        let dir = tempfile::tempdir().unwrap();
        let initrd = dir.path().join("initrd");
        // The kernel unpacks one archive after the other: ours replaces the agent, and the modules stay.
        let mut archives = fs::read(base).unwrap();
        archives.resize(archives.len().next_multiple_of(4), 0);
        archives
            .extend(archive(&[("test-init", INIT.as_bytes()), ("bin/busybox", &fs::read("/bin/busybox").unwrap())]));
        fs::write(&initrd, archives).unwrap();
        Some(Self { kernel, initrd, virtiofsd, dir })
    }
}

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let directory = cpio::newc::Builder::new("bin").mode(0o040_755);
    directory.write(&mut archive, 0).finish().unwrap();
    for (name, content) in files {
        let mut file = cpio::newc::Builder::new(name).mode(0o100_755).write(&mut archive, content.len() as u32);
        std::io::Write::write_all(&mut file, content).unwrap();
        file.finish().unwrap();
    }
    cpio::newc::trailer(&mut archive).unwrap();
    archive
}

/// A launcher process; killed when dropped, and its VM with it.
pub struct Launcher {
    pub child: Child,
    pub client: VmmClient,
    pub dir: TempDir,
}

impl Launcher {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vmm.sock");
        let listener = listen::bind(&socket).unwrap();
        let child = Command::new(LAUNCHER)
            .arg("serve")
            .env("CAISSON_LOG", "debug")
            .stdin(listen::as_stdin(listener))
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let stream = UnixStream::connect(&socket).await.unwrap();
        Self { child, client: VmmClient::new(Client::new(stream.into())), dir }
    }

    pub fn run_dir(&self) -> PathBuf {
        let dir = self.dir.path().join("vmm");
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// A small VM that does `what`.
    pub fn request(&self, images: &Images, what: &str) -> CreateRequest {
        let vm = VmConfig {
            hypervisor_path: QEMU.into(),
            kernel: text(&images.kernel),
            initrd: text(&images.initrd),
            kernel_params: format!("rdinit=/test-init do={what}"),
            vcpus: 1,
            memory_mib: 192,
            ..Default::default()
        };
        let options = "accel = \"tcg\"".into();
        CreateRequest { run_dir: text(&self.run_dir()), vm: Some(vm).into(), options, ..Default::default() }
    }

    pub async fn create(&self, request: &CreateRequest) -> Result<CreateResponse, Status> {
        self.client.create(deadline(LIMIT), request).await.map_err(Status::from)
    }

    pub async fn boot(&self) -> Result<(), Status> {
        self.client.boot(deadline(LIMIT), &vmm::BootRequest::new()).await.map(drop).map_err(Status::from)
    }

    pub async fn stop(&self, grace: Duration) {
        let request = vmm::StopRequest { grace_ms: grace.as_millis() as u32, ..Default::default() };
        self.client.stop(deadline(LIMIT), &request).await.unwrap();
    }

    pub async fn wait(&self) -> WaitResponse {
        let wait = vmm::WaitRequest::new();
        let wait = self.client.wait(no_deadline(), &wait);
        match timeout(LIMIT, wait).await {
            Ok(exit) => exit.unwrap(),
            Err(_) => panic!("the VM does not end; its console:\n{}", self.console().await),
        }
    }

    pub async fn state(&self) -> vmm::StateResponse {
        self.client.state(deadline(LIMIT), &vmm::StateRequest::new()).await.unwrap()
    }

    pub async fn console(&self) -> String {
        self.state().await.console_tail
    }

    /// Answers when the console's log has `text`. The log's directory tells of each change.
    pub async fn until_console_has(&self, log: &Path, text: &str) {
        let watch = nix::sys::inotify::Inotify::init(nix::sys::inotify::InitFlags::IN_CLOEXEC).unwrap();
        watch.add_watch(log, nix::sys::inotify::AddWatchFlags::IN_MODIFY).unwrap();
        let (log, text) = (log.to_owned(), text.to_owned());
        let seen = tokio::task::spawn_blocking(move || {
            while !fs::read_to_string(&log).unwrap_or_default().contains(&text) {
                watch.read_events().unwrap();
            }
        });
        timeout(LIMIT, seen).await.expect("the guest writes what is waited for").unwrap();
    }

    /// Everything that is left in the run directory.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        fs::read_dir(self.run_dir()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    pub async fn ended(&mut self) -> ExitStatus {
        timeout(LIMIT, self.child.wait()).await.expect("the launcher ends").unwrap()
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(pid(self.child.id().unwrap()), signal).unwrap();
    }
}

pub fn device(id: &str, kind: Kind) -> Device {
    Device { id: id.into(), kind: Some(kind), ..Default::default() }
}

pub fn text(path: &Path) -> String {
    path.to_str().unwrap().into()
}

pub fn pid(number: u32) -> nix::unistd::Pid {
    nix::unistd::Pid::from_raw(number as i32)
}

/// Answers when process `number` has ended.
pub async fn process_ended(number: u32) {
    let process = rustix::process::Pid::from_raw(number as i32).unwrap();
    let Ok(process) = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()) else { return };
    let ended = tokio::task::spawn_blocking(move || {
        let mut ended = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut ended, None).unwrap();
    });
    timeout(LIMIT, ended).await.expect("the process ends").unwrap();
}

/// The children of process `number`.
pub fn children(number: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{number}/task/{number}/children")).unwrap_or_default();
    children.split_whitespace().map(|number| number.parse().unwrap()).collect()
}
