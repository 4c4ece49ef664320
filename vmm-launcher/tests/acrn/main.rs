//! ACRN's launcher against a stand-in for `acrn-dm`: the real one needs a machine that runs below ACRN's hypervisor.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use caisson_protocol::{
    deadline, listen, no_deadline,
    status::{Code, Status},
    vmm::{self, Block, CreateRequest, Device, ExitReason, Rng, VmConfig, WaitResponse, device::Kind},
    vmm_ttrpc::VmmClient,
};
use tempfile::TempDir;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::timeout,
};
use ttrpc::asynchronous::Client;

const LAUNCHER: &str = env!("CARGO_BIN_EXE_caisson-vmm-acrn");
const LIMIT: Duration = Duration::from_secs(20);

struct Acrn {
    _child: Child,
    client: VmmClient,
    dir: TempDir,
}

impl Acrn {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vmm.sock");
        let listener = listen::bind(&socket).unwrap();
        let mut command = Command::new(LAUNCHER);
        command.arg("serve").stdin(listen::as_stdin(listener)).stdout(Stdio::null()).kill_on_drop(true);
        let child = command.spawn().unwrap();
        let stream = UnixStream::connect(&socket).await.unwrap();
        Self { _child: child, client: VmmClient::new(Client::new(stream.into())), dir }
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.dir.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn run_dir(&self) -> PathBuf {
        let path = self.dir.path().join("run");
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn request(&self, what: &str) -> CreateRequest {
        let mut kernel = vec![0; 0x202];
        kernel.extend_from_slice(b"HdrS");
        let vm = VmConfig {
            hypervisor_path: acrn_dm().to_str().unwrap().into(),
            kernel: self.file("kernel", &kernel),
            initrd: self.file("initrd", b"initrd"),
            kernel_params: format!("do={what}"),
            vcpus: 1,
            memory_mib: 256,
            devices: vec![device("rng", Kind::Rng(Rng { source: "/dev/urandom".into(), ..Default::default() }))],
            ..Default::default()
        };
        CreateRequest {
            run_dir: self.run_dir().to_str().unwrap().into(),
            vm: Some(vm).into(),
            options: "iasl = \"/bin/true\"".into(),
            ..Default::default()
        }
    }

    async fn boot(&self, request: &CreateRequest) -> u32 {
        let created = self.client.create(deadline(LIMIT), request).await.unwrap();
        self.client.boot(deadline(LIMIT), &vmm::BootRequest::new()).await.unwrap();
        created.pid
    }

    async fn wait(&self) -> WaitResponse {
        timeout(LIMIT, self.client.wait(no_deadline(), &vmm::WaitRequest::new())).await.expect("it ends").unwrap()
    }

    async fn attach(&self, id: &str, path: &str) -> Result<String, Status> {
        let block = Kind::Block(Block { path: path.into(), read_only: true, ..Default::default() });
        let request = vmm::AttachRequest { device: Some(device(id, block)).into(), ..Default::default() };
        let answer = self.client.attach(deadline(LIMIT), &request).await.map_err(Status::from)?;
        Ok(answer.device.unwrap_or_default().address)
    }
}

fn device(id: &str, kind: Kind) -> Device {
    Device { id: id.into(), kind: Some(kind), ..Default::default() }
}

/// Examples are built beside the binaries.
fn acrn_dm() -> PathBuf {
    Path::new(LAUNCHER).with_file_name("examples").join("acrn-dm-fake")
}

#[tokio::test]
async fn a_guest_boots_and_powers_off() {
    let acrn = Acrn::start().await;
    acrn.boot(&acrn.request("poweroff")).await;
    let end = acrn.wait().await;
    assert_eq!(end.reason, ExitReason::GUEST_SHUTDOWN.into(), "{}", end.detail);
    assert!(end.console_tail.contains("guest: up with console=ttyS0"), "{}", end.console_tail);
}

#[tokio::test]
async fn the_guest_does_not_run_before_it_is_booted() {
    let acrn = Acrn::start().await;
    let pid = acrn.client.create(deadline(LIMIT), &acrn.request("poweroff")).await.unwrap().pid;
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(!program.ends_with("acrn-dm-fake"), "{}", program.display());
    acrn.client.boot(deadline(LIMIT), &vmm::BootRequest::new()).await.unwrap();
    assert_eq!(acrn.wait().await.reason, ExitReason::GUEST_SHUTDOWN.into());
}

#[tokio::test]
async fn a_panic_is_told_in_the_kernels_words() {
    let acrn = Acrn::start().await;
    acrn.boot(&acrn.request("panic")).await;
    let end = acrn.wait().await;
    assert_eq!(end.reason, ExitReason::GUEST_PANIC.into());
    assert_eq!(end.detail, "the guest kernel panicked: no init found");
}

#[tokio::test]
async fn what_acrn_dm_says_of_its_failure_is_told() {
    let acrn = Acrn::start().await;
    acrn.boot(&acrn.request("crash")).await;
    let end = acrn.wait().await;
    assert_eq!(end.reason, ExitReason::HYPERVISOR_FAILED.into());
    assert!(end.detail.ends_with("exited with status 1: vm_run: failed to run the guest"), "{}", end.detail);
}

#[tokio::test]
async fn a_guest_is_stopped_by_force_and_leaves_no_process() {
    let acrn = Acrn::start().await;
    let pid = acrn.boot(&acrn.request("nothing")).await;
    let stop = vmm::StopRequest { grace_ms: 100, ..Default::default() };
    acrn.client.stop(deadline(LIMIT), &stop).await.unwrap();
    assert_eq!(acrn.wait().await.reason, ExitReason::STOPPED.into());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test]
async fn a_disk_is_attached_to_an_empty_slot_once() {
    let acrn = Acrn::start().await;
    let disk = acrn.file("disk", &[0; 512]);
    let request = CreateRequest { options: "iasl = \"/bin/true\"\ndisk_slots = 1".into(), ..acrn.request("nothing") };
    acrn.boot(&request).await;
    // The stand-in listens before its guest says a word, and the guest's console tells when.
    until_console_has(&acrn, "guest: up").await;
    let refused = acrn.attach("missing", "/nonexistent/disk").await.unwrap_err();
    assert_eq!(refused.code, Code::INVALID_ARGUMENT, "{refused}");
    assert_eq!(acrn.attach("data", &disk).await.unwrap(), "pci:0000:00:03.0");
    let full = acrn.attach("more", &disk).await.unwrap_err();
    assert_eq!(full.code, Code::UNIMPLEMENTED);
    assert!(full.to_string().contains("raise disk_slots"), "{full}");
}

async fn until_console_has(acrn: &Acrn, text: &str) {
    let seen = async {
        loop {
            let state = acrn.client.state(deadline(LIMIT), &vmm::StateRequest::new()).await.unwrap();
            if state.console_tail.contains(text) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, seen).await.expect("the guest writes what is waited for");
}

#[tokio::test]
async fn a_wrong_iasl_is_named() {
    let acrn = Acrn::start().await;
    let options = "iasl = \"/nonexistent/iasl\"".into();
    acrn.boot(&CreateRequest { options, ..acrn.request("poweroff") }).await;
    let end = acrn.wait().await;
    assert!(end.detail.contains("Could not open iasl /nonexistent/iasl"), "{}", end.detail);
}

#[tokio::test]
async fn capabilities_are_refused_where_there_is_no_acrn() {
    let output = Command::new(LAUNCHER).args(["capabilities", "--hypervisor"]).arg(acrn_dm()).output().await.unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && words.contains("not the Service VM of an ACRN hypervisor"), "{words}");
}
