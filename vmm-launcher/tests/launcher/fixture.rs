//! A launcher process with a client, and a guest whose whole user space is a shell script.
//!
//! Each test runs for each backend that can run here. A backend that cannot says why on standard error.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use caisson_protocol::{
    deadline, listen, no_deadline,
    processes::ProcessList,
    status::Status,
    sys::register,
    vmm::{
        self, CapabilitiesRequest, Console, CreateRequest, CreateResponse, Device, VmConfig, WaitResponse, device::Kind,
    },
    vmm_ttrpc::VmmClient,
};
use caisson_testbed::{Installation, Recording, skip};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tempfile::TempDir;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::timeout,
};
use ttrpc::asynchronous::Client;

/// For anything that a guest does, emulated on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Makes one test of each function for each backend: `boot::qemu::a_guest_…`, `boot::builtin::a_guest_…`.
macro_rules! for_each_backend {
    ($($test:ident),+ $(,)?) => {
        $crate::fixture::for_backend!(qemu, Qemu, $($test),+);
        $crate::fixture::for_backend!(builtin, Builtin, $($test),+);
        $crate::fixture::for_backend!(cloud_hypervisor, CloudHypervisor, $($test),+);
        $crate::fixture::for_backend!(firecracker, Firecracker, $($test),+);
        $crate::fixture::for_backend!(stratovirt, StratoVirt, $($test),+);
    };
}

/// Makes a test of each function for one backend.
macro_rules! for_backend {
    ($module:ident, $backend:ident, $($test:ident),+ $(,)?) => {
        mod $module {
            use crate::fixture::Backend;

            $(
                #[tokio::test]
                async fn $test() {
                    if let Some(mut recording) = Backend::$backend.record() {
                        super::$test(Backend::$backend).await;
                        recording.pass();
                    }
                }
            )+
        }
    };
}

pub(crate) use {for_backend, for_each_backend};

/// A hypervisor with its launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Qemu,
    Builtin,
    CloudHypervisor,
    Firecracker,
    StratoVirt,
}

impl Backend {
    /// As in the launcher's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Builtin => "builtin",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
            Self::StratoVirt => "stratovirt",
        }
    }

    /// The launcher: in `$CAISSON_LAUNCHERS`, or where cargo has put QEMU's.
    pub fn launcher(self) -> PathBuf {
        let built = || Path::new(env!("CARGO_BIN_EXE_caisson-vmm-qemu")).with_file_name("");
        let folder = env::var_os("CAISSON_LAUNCHERS").map_or_else(built, PathBuf::from);
        folder.join(format!("caisson-vmm-{}", self.name()))
    }

    /// What makes a VM start quickest here; KVM is not tried again and again where it does not work.
    pub fn options(self) -> String {
        match self {
            Self::Qemu if kvm().is_ok() => "accel = \"kvm\"".into(),
            Self::Qemu => "accel = \"tcg\"".into(),
            Self::Builtin | Self::CloudHypervisor | Self::Firecracker | Self::StratoVirt => String::new(),
        }
    }

    /// The executable to name in requests: one of `$CAISSON_HYPERVISORS` or of the host, for hypervisors that need not be
    /// there; empty for the launcher's default.
    pub fn hypervisor(self) -> Result<String, String> {
        match self {
            Self::Qemu | Self::Builtin => Ok(String::new()),
            Self::CloudHypervisor | Self::Firecracker | Self::StratoVirt => {
                let folder = env::var_os("CAISSON_HYPERVISORS").map_or_else(|| "/usr/bin".into(), PathBuf::from);
                let path = folder.join(self.name());
                if path.exists() { Ok(text(&path)) } else { Err(format!("there is no {}", path.display())) }
            }
        }
    }

    /// Whether its guests can have virtio-fs.
    pub fn shares_directories(self) -> bool {
        self != Self::Firecracker
    }

    /// What a VM needs whose size is to change, or that is to take devices while it runs.
    pub fn growing(self) -> &'static str {
        match self {
            Self::Qemu => "\nmachine_type = \"q35\"",
            Self::Builtin | Self::CloudHypervisor | Self::Firecracker | Self::StratoVirt => "",
        }
    }

    /// Whether its network cards can have several pairs of queues.
    pub fn has_queue_pairs(self) -> bool {
        match self {
            Self::Qemu | Self::Builtin | Self::CloudHypervisor => true,
            Self::Firecracker | Self::StratoVirt => false,
        }
    }

    /// Whether it tells when a guest has come as far as it was asked to, which takes or gives memory.
    pub fn tells_of_memory(self) -> bool {
        match self {
            Self::Qemu | Self::Builtin | Self::StratoVirt => true,
            Self::CloudHypervisor | Self::Firecracker => false,
        }
    }

    /// How it ends when its guest reboots.
    pub fn rebooted(self) -> &'static str {
        match self {
            Self::Qemu | Self::Builtin | Self::CloudHypervisor | Self::Firecracker => {
                "the guest rebooted, which ends its VM"
            }
            // It takes one for the other.
            Self::StratoVirt => "the guest ended itself",
        }
    }

    /// How it ends when its guest powers off.
    pub fn powered_off(self) -> &'static str {
        match self {
            Self::Qemu | Self::Builtin | Self::CloudHypervisor => "the guest powered off",
            // It has no power switch.
            Self::Firecracker => "the guest rebooted, which ends its VM",
            Self::StratoVirt => "the guest ended itself",
        }
    }

    /// Whether guests run with it here.
    fn able(self) -> Result<(), String> {
        let launcher = self.launcher();
        match self {
            _ if !launcher.exists() => Err(format!("{} is not built", launcher.display())),
            Self::Qemu => Ok(()),
            Self::Builtin => kvm().clone(),
            Self::CloudHypervisor | Self::Firecracker | Self::StratoVirt => {
                self.hypervisor().and_then(|_| kvm().clone())
            }
        }
    }

    /// The one among `images` that it boots.
    pub fn kernel(self, images: &Images) -> PathBuf {
        match self {
            Self::StratoVirt => images.kernel.with_file_name("bzImage"),
            Self::Qemu | Self::Builtin | Self::CloudHypervisor | Self::Firecracker => images.kernel.clone(),
        }
    }

    /// What a VM needs that is to be paused.
    pub fn pausable(self) -> &'static str {
        match self {
            Self::StratoVirt => "\nseccomp = false",
            Self::Qemu | Self::Builtin | Self::CloudHypervisor | Self::Firecracker => "",
        }
    }

    /// Begins the test of this thread, if guests run with it here; says why not.
    pub fn record(self) -> Option<Recording> {
        if let Err(why) = self.able() {
            eprintln!("not run with {}: {why}", self.name());
            Recording::not_run(self.name(), &why);
            let required = std::env::var(REQUIRED).unwrap_or_default();
            assert!(!required.split(' ').any(|name| name == self.name()), "${REQUIRED} demands {}", self.name());
            return None;
        }
        let program = match self {
            Self::Qemu => Some(PathBuf::from("/usr/bin/qemu-system-x86_64")),
            Self::Builtin => None,
            Self::CloudHypervisor | Self::Firecracker | Self::StratoVirt => self.hypervisor().ok().map(PathBuf::from),
        };
        Some(Recording::begin(self.name(), program.as_deref()))
    }
}

/// Names of backends that must not be passed over, where the test's caller knows that they can run.
const REQUIRED: &str = "CAISSON_REQUIRED_BACKENDS";

/// Whether KVM runs guests here.
pub fn kvm() -> &'static Result<(), String> {
    static KVM: std::sync::OnceLock<Result<(), String>> = std::sync::OnceLock::new();
    KVM.get_or_init(caisson_vmm_launcher::kvm::probe)
}

/// Ends as the kernel parameter `do=` says.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /sys /dev /mnt
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "$module"; done < /lib/modules/order
end() { grep -q caisson.end=reboot /proc/cmdline && reboot -f; poweroff -f; }
echo "guest: up"
case "$(cat /proc/cmdline)" in
*do=poweroff*) end ;;
*do=reboot*) reboot -f ;;
*do=panic*) echo c > /proc/sysrq-trigger ;;
*do=list*)
    for disk in /sys/block/vd*; do echo "guest: ${disk##*/} is $(cat $disk/serial) read-only $(cat $disk/ro)"; done
    for card in /sys/class/net/e*; do echo "guest: card $(cat $card/address)"; done
    mount -t virtiofs share /mnt && echo "guest: shared $(cat /mnt/hello)" && echo written > /mnt/answer
    end ;;
*do=watch-sizes*)
    seen=none
    while :; do
        now=$(cat /sys/block/vd*/size | tr '\n' ' ')
        [ "$now" = "$seen" ] || { echo "guest: sizes $now"; seen=$now; }
        usleep 100000
    done ;;
*do=watch-cards*)
    seen=none
    change=0
    while :; do
        now=$(cat /sys/class/net/e*/address 2>/dev/null | tr '\n' ' ')
        [ "$now" = "$seen" ] || { change=$((change + 1)); echo "guest: cards $change: $now"; seen=$now; }
        usleep 100000
    done ;;
*do=watch*)
    seen=none
    while :; do
        now=$(echo /sys/block/vd*/serial)
        [ "$now" = "$seen" ] || { echo "guest: disks $(cat $now 2>/dev/null)"; seen=$now; }
        usleep 100000
    done ;;
*do=grow*)
    seen=none
    while :; do
        for switch in /sys/devices/system/cpu/cpu*/online; do
            [ "$(cat $switch 2>/dev/null)" != 0 ] || echo 1 > $switch
        done
        now="$(nproc) processors, $(($(sed -n 's/MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024)) MiB"
        [ "$now" = "$seen" ] || { echo "guest: $now"; seen=$now; }
        usleep 100000
    done ;;
*do=tick*) tick=0; while :; do tick=$((tick + 1)); echo "guest: tick $tick"; sleep 1; done ;;
*do=size*)
    echo "guest: $(nproc) processors, $(($(sed -n 's/MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024)) MiB"
    end ;;
*do=script*) sh /script; end ;;
*do=echo*)
    read -r line; echo "guest: heard $line"
    read -r line; echo "guest: heard $line"
    end ;;
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
        let kernel =
            setting("CAISSON_TEST_KERNEL").or(installation.as_ref().ok().map(|found| found.guest.kernel.clone()));
        let initrd =
            setting("CAISSON_TEST_INITRD").or(installation.as_ref().ok().map(|found| found.guest.initrd.clone()));
        let (Some(kernel), Some(base)) = (kernel, initrd) else {
            skip("no guest to boot; run `cargo xtask setup` or set CAISSON_TEST_KERNEL and CAISSON_TEST_INITRD");
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

/// Executable files, and the directories that they are in, for the end of an initrd.
pub fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, content) in files {
        let parents: Vec<_> = Path::new(name).ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).collect();
        for parent in parents.iter().rev() {
            let directory = cpio::newc::Builder::new(parent.to_str().unwrap()).mode(0o040_755);
            directory.write(&mut archive, 0).finish().unwrap();
        }
        let mut file = cpio::newc::Builder::new(name).mode(0o100_755).write(&mut archive, content.len() as u32);
        std::io::Write::write_all(&mut file, content).unwrap();
        file.finish().unwrap();
    }
    cpio::newc::trailer(&mut archive).unwrap();
    archive
}

/// A launcher process; killed when dropped, and its VM with it, even if it is to outlive its launcher.
pub struct Launcher {
    pub backend: Backend,
    pub child: Child,
    pub client: VmmClient,
    pub dir: TempDir,
}

impl Launcher {
    pub async fn start(backend: Backend) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (child, client) = Self::serve(backend, dir.path()).await;
        Self { backend, child, client, dir }
    }

    /// Another one in the same directory; the first has ended.
    pub async fn start_again(&mut self) {
        (self.child, self.client) = Self::serve(self.backend, self.dir.path()).await;
    }

    async fn serve(backend: Backend, dir: &Path) -> (Child, VmmClient) {
        let socket = dir.join("vmm.sock");
        let listener = listen::bind(&socket).unwrap();
        let child = Command::new(backend.launcher())
            .arg("serve")
            .env("CAISSON_LOG", "debug")
            .stdin(listen::as_stdin(listener))
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let stream = UnixStream::connect(&socket).await.unwrap();
        (child, VmmClient::new(Client::new(stream.into())))
    }

    pub fn run_dir(&self) -> PathBuf {
        let dir = self.dir.path().join("vmm");
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// A small VM that does `what`.
    pub fn request(&self, images: &Images, what: &str) -> CreateRequest {
        let vm = VmConfig {
            hypervisor_path: self.backend.hypervisor().unwrap_or_default(),
            kernel: text(&self.backend.kernel(images)),
            initrd: text(&images.initrd),
            kernel_params: format!("rdinit=/test-init do={what}"),
            vcpus: 1,
            memory_mib: 192,
            ..Default::default()
        };
        let options = self.backend.options();
        CreateRequest { run_dir: text(&self.run_dir()), vm: Some(vm).into(), options, ..Default::default() }
    }

    /// Asks what this hypervisor can do.
    pub fn capabilities(&self) -> CapabilitiesRequest {
        let hypervisor_path = self.backend.hypervisor().unwrap_or_default();
        CapabilitiesRequest { hypervisor_path, ..Default::default() }
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

    /// A console for the guest, of which [`Self::heard`] tells.
    pub fn logged_console(&self) -> Device {
        device("console", Kind::Console(Console { log: text(&self.console_log()), ..Default::default() }))
    }

    fn console_log(&self) -> PathBuf {
        self.dir.path().join("console.log")
    }

    /// What the guest has written.
    pub fn heard(&self) -> String {
        fs::read_to_string(self.console_log()).unwrap_or_default()
    }

    /// Answers when the guest has written `text`. The log tells of each change.
    pub async fn until_console_has(&self, text: &str) {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&watch, self.console_log(), WatchFlags::MODIFY).unwrap();
        let watch = register(watch).unwrap();
        let seen = async {
            while !self.heard().contains(text) {
                let mut changed = watch.readable().await.unwrap();
                // However many: one look is enough for all.
                while rustix::io::read(watch.get_ref(), &mut [0; 4096]).is_ok() {}
                changed.clear_ready();
            }
        };
        timeout(LIMIT, seen).await.unwrap_or_else(|_| panic!("the guest did not write {text:?} but\n{}", self.heard()));
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

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = ProcessList::in_dir(self.dir.path()).end_all(LIMIT);
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
