//! ACRN's launcher against a stand-in for `acrn-dm`: the real one needs a machine that runs below ACRN's hypervisor.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use caisson_protocol::{
    deadline, listen, no_deadline,
    status::{Code, Status},
    vmm::{
        self, Block, CapabilitiesResponse, CreateRequest, Device, ExitReason, GuestDevice, Net, Rng, VmConfig, Vsock,
        WaitResponse, device::Kind,
    },
    vmm_ttrpc::VmmClient,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
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
            options: self.options("20200925", ""),
            ..Default::default()
        }
    }

    /// With an iasl of its own of this version.
    fn options(&self, iasl_version: &str, others: &str) -> String {
        let words = format!("ASL+ Optimizing Compiler/Disassembler version {iasl_version}");
        let iasl = self.file(&format!("iasl-{iasl_version}"), format!("#!/bin/sh\necho '{words}'\n").as_bytes());
        fs::set_permissions(&iasl, fs::Permissions::from_mode(0o755)).unwrap();
        format!("iasl = \"{iasl}\"\n{others}")
    }

    /// A guest that does nothing and has this device.
    fn request_with(&self, kind: Kind) -> CreateRequest {
        let mut request = self.request("nothing");
        request.vm.as_mut().unwrap().devices.push(device("added", kind));
        request
    }

    async fn create(&self, request: &CreateRequest) -> Result<vmm::CreateResponse, Status> {
        self.client.create(deadline(LIMIT), request).await.map_err(Status::from)
    }

    async fn try_boot(&self) -> Result<(), Status> {
        self.client.boot(deadline(LIMIT), &vmm::BootRequest::new()).await.map(drop).map_err(Status::from)
    }

    async fn boot(&self, request: &CreateRequest) -> vmm::CreateResponse {
        let created = self.create(request).await.unwrap();
        self.try_boot().await.unwrap();
        created
    }

    /// A boot that fails.
    async fn boot_refused(&self, request: &CreateRequest) -> Status {
        self.create(request).await.unwrap();
        self.try_boot().await.unwrap_err()
    }

    async fn wait(&self) -> WaitResponse {
        timeout(LIMIT, self.client.wait(no_deadline(), &vmm::WaitRequest::new())).await.expect("it ends").unwrap()
    }

    async fn stop(&self) {
        let stop = vmm::StopRequest { grace_ms: 100, ..Default::default() };
        self.client.stop(deadline(LIMIT), &stop).await.unwrap();
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

fn network_card(tap: &str, mac: &str, queue_pairs: u32) -> Kind {
    Kind::Net(Net { tap: tap.into(), mac: mac.into(), queue_pairs, ..Default::default() })
}

/// A network of this thread's own, which launchers inherit, with tap0.
fn make_network() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let made = std::process::Command::new("ip").args(["tuntap", "add", "tap0", "mode", "tap"]).status();
    assert!(made.unwrap().success());
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
    let pid = acrn.create(&acrn.request("poweroff")).await.unwrap().pid;
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(!program.ends_with("acrn-dm-fake"), "{}", program.display());
    acrn.try_boot().await.unwrap();
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
async fn a_guest_that_restarts_itself_has_ended() {
    let acrn = Acrn::start().await;
    acrn.boot(&acrn.request("reboot")).await;
    assert_eq!(acrn.wait().await.reason, ExitReason::GUEST_SHUTDOWN.into());
}

#[tokio::test]
async fn a_guest_can_have_its_root_on_a_disk() {
    let acrn = Acrn::start().await;
    let mut request = acrn.request("poweroff");
    let vm = request.vm.as_mut().unwrap();
    vm.initrd.clear();
    vm.image = acrn.file("image", &[0; 512]);
    let created = acrn.boot(&request).await;
    assert_eq!(created.devices, [GuestDevice { id: "rng".into(), ..Default::default() }]);
    let end = acrn.wait().await;
    assert!(end.console_tail.contains("root=/dev/vda ro do=poweroff"), "{}", end.console_tail);
}

#[tokio::test]
async fn what_acrn_dm_says_of_its_failure_is_told() {
    let acrn = Acrn::start().await;
    acrn.create(&acrn.request("crash")).await.unwrap();
    // It may be seen to have begun before.
    let _ = acrn.try_boot().await;
    let end = acrn.wait().await;
    assert_eq!(end.reason, ExitReason::HYPERVISOR_FAILED.into());
    assert!(end.detail.starts_with(acrn_dm().to_str().unwrap()), "{}", end.detail);
    assert!(end.detail.ends_with("exited with status 1: vm_run: failed to run the guest"), "{}", end.detail);
}

#[tokio::test]
async fn a_guest_is_stopped_by_force_and_leaves_nothing() {
    let acrn = Acrn::start().await;
    let pid = acrn.boot(&acrn.request("nothing")).await.pid;
    acrn.stop().await;
    assert_eq!(acrn.wait().await.reason, ExitReason::STOPPED.into());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(fs::read_dir(acrn.run_dir()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_vm_is_stopped_before_it_is_booted() {
    let acrn = Acrn::start().await;
    let pid = acrn.create(&acrn.request("nothing")).await.unwrap().pid;
    acrn.stop().await;
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(acrn.try_boot().await.unwrap_err().code, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn a_boot_that_waits_for_acrn_is_stopped() {
    let acrn = Acrn::start().await;
    acrn.create(&acrn.request("hang")).await.unwrap();
    let (booted, ()) = tokio::join!(acrn.try_boot(), acrn.stop());
    booted.unwrap_err();
    assert_eq!(acrn.wait().await.reason, ExitReason::STOPPED.into());
}

#[tokio::test]
async fn an_iasl_that_is_too_old_is_told_by_boot() {
    let acrn = Acrn::start().await;
    let options = acrn.options("20190102", "");
    let error = acrn.boot_refused(&CreateRequest { options, ..acrn.request("nothing") }).await;
    assert_eq!(error.code, Code::UNAVAILABLE);
    assert!(error.message.contains("Please install iasl tool with version >= 20190703"), "{error}");
}

#[tokio::test]
async fn what_an_earlier_acrn_dm_has_left_is_not_taken_for_the_new_ones() {
    let acrn = Acrn::start().await;
    fs::write(acrn.run_dir().join("acrn-dm.sock"), "").unwrap();
    let options = acrn.options("20190102", "");
    acrn.boot_refused(&CreateRequest { options, ..acrn.request("nothing") }).await;
}

#[tokio::test]
async fn an_empty_initrd_is_told_by_boot() {
    let acrn = Acrn::start().await;
    let request = acrn.request("nothing");
    let initrd = acrn.file("initrd", b"");
    let error = acrn.boot_refused(&request).await;
    assert!(error.message.ends_with(&format!("SW_LOAD: check_image failed for '{initrd}'")), "{error}");
}

#[tokio::test]
async fn a_guest_gets_a_network_card() {
    make_network();
    let acrn = Acrn::start().await;
    let created = acrn.boot(&acrn.request_with(network_card("tap0", "02:00:00:00:00:01", 1))).await;
    assert_eq!(created.devices.len(), 2);
}

#[tokio::test]
async fn a_network_interface_that_acrn_dm_could_not_open_is_refused() {
    make_network();
    let acrn = Acrn::start().await;
    let error = acrn.create(&acrn.request_with(network_card("lo", "02:00:00:00:00:01", 1))).await.unwrap_err();
    assert!(error.message.starts_with("the tap interface lo cannot be used"), "{error}");
}

#[tokio::test]
async fn an_address_of_many_cards_is_not_a_cards() {
    make_network();
    let acrn = Acrn::start().await;
    acrn.create(&acrn.request_with(network_card("tap0", "01:00:00:00:00:01", 1))).await.unwrap();
    let _ = acrn.try_boot().await;
    let end = acrn.wait().await;
    assert!(end.detail.ends_with("Invalid MAC 01:00:00:00:00:01"), "{}", end.detail);
}

#[tokio::test]
async fn a_guest_gets_the_kernels_vsock_or_none() {
    let acrn = Acrn::start().await;
    let socket = acrn.run_dir().join("vsock.sock").to_str().unwrap().into();
    let created = acrn.create(&acrn.request_with(Kind::Vsock(Vsock { socket, ..Default::default() }))).await;
    if Path::new("/dev/vhost-vsock").exists() {
        acrn.try_boot().await.unwrap();
        assert!(created.unwrap().devices[1].address.starts_with("vsock:"));
    } else {
        let error = created.unwrap_err();
        assert_eq!(error.code, Code::UNIMPLEMENTED);
        assert!(error.message.contains("load the module vhost_vsock"), "{error}");
    }
}

#[tokio::test]
async fn a_disk_is_attached_to_an_empty_slot_once() {
    let acrn = Acrn::start().await;
    let disk = acrn.file("disk", &[0; 512]);
    let options = acrn.options("20200925", "disk_slots = 1");
    acrn.boot(&CreateRequest { options, ..acrn.request("nothing") }).await;
    let missing = acrn.attach("missing", "/nonexistent/disk").await.unwrap_err();
    assert_eq!(missing.code, Code::INVALID_ARGUMENT, "{missing}");
    assert_eq!(acrn.attach("data", &disk).await.unwrap(), "pci:0000:00:03.0");
    let full = acrn.attach("more", &disk).await.unwrap_err();
    assert_eq!(full.code, Code::UNIMPLEMENTED);
    assert!(full.to_string().contains("raise disk_slots"), "{full}");
}

#[tokio::test]
async fn as_many_disks_are_attached_as_were_likely() {
    let acrn = Acrn::start().await;
    let disk = acrn.file("disk", &[0; 512]);
    let mut request = acrn.request("nothing");
    request.vm.as_mut().unwrap().spare_disks = 1;
    request.options = acrn.options("20200925", "disk_slots = 0");
    acrn.boot(&request).await;
    assert_eq!(acrn.attach("data", &disk).await.unwrap(), "pci:0000:00:03.0");
}

#[tokio::test]
async fn the_slot_of_a_refused_disk_is_used_again() {
    let acrn = Acrn::start().await;
    let (disk, odd) = (acrn.file("disk", &[0; 512]), acrn.file("odd", &[0; 700]));
    acrn.boot(&acrn.request("nothing")).await;
    let refused = acrn.attach("odd", &odd).await.unwrap_err();
    assert!(refused.message.starts_with(&format!("acrn-dm refused the disk {odd} for its slot 3")), "{refused}");
    assert_eq!(acrn.attach("data", &disk).await.unwrap(), "pci:0000:00:03.0");
}

#[tokio::test]
async fn the_slot_of_a_disk_that_may_have_been_taken_is_left_alone() {
    let acrn = Acrn::start().await;
    let disk = acrn.file("disk", &[0; 512]);
    acrn.boot(&acrn.request("mute")).await;
    let unknown = acrn.attach("data", &disk).await.unwrap_err();
    assert!(unknown.message.contains("does not say whether it took the disk"), "{unknown}");
    assert_eq!(acrn.attach("data", &disk).await.unwrap(), "pci:0000:00:04.0");
}

#[tokio::test]
async fn nothing_is_attached_before_the_guest_runs() {
    let acrn = Acrn::start().await;
    acrn.create(&acrn.request("nothing")).await.unwrap();
    let error = acrn.attach("data", &acrn.file("disk", &[0; 512])).await.unwrap_err();
    let expected = "cannot attach a device to a VM that is created but not booted";
    assert_eq!(error, Status::new(Code::FAILED_PRECONDITION, expected));
}

#[tokio::test]
async fn what_acrn_dm_cannot_do_is_unimplemented() {
    make_network();
    let acrn = Acrn::start().await;
    acrn.boot(&acrn.request("nothing")).await;
    let (client, limit) = (&acrn.client, || deadline(LIMIT));
    let card = device("card", network_card("tap0", "02:00:00:00:00:01", 1));
    let attach = vmm::AttachRequest { device: Some(card).into(), ..Default::default() };
    unimplemented("attaching a net device", client.attach(limit(), &attach).await);
    unimplemented("detaching", client.detach(limit(), &vmm::DetachRequest::new()).await);
    unimplemented("pausing", client.pause(limit(), &vmm::PauseRequest::new()).await);
    unimplemented("a snapshot", client.snapshot(limit(), &vmm::SnapshotRequest::new()).await);
    unimplemented("changing the number of vCPUs", client.resize_vcpus(limit(), &vmm::ResizeVcpusRequest::new()).await);
    unimplemented(
        "changing the amount of memory",
        client.resize_memory(limit(), &vmm::ResizeMemoryRequest::new()).await,
    );
    unimplemented("changing the size", client.resize_balloon(limit(), &vmm::ResizeBalloonRequest::new()).await);
}

#[tokio::test]
async fn no_vm_is_adopted_or_restored() {
    let acrn = Acrn::start().await;
    unimplemented("a VM of acrn cannot be", acrn.client.adopt(deadline(LIMIT), &vmm::AdoptRequest::new()).await);
    unimplemented("restoring", acrn.client.restore(deadline(LIMIT), &vmm::RestoreRequest::new()).await);
}

/// `what` begins the answer.
fn unimplemented<T: std::fmt::Debug>(what: &str, answer: ttrpc::Result<T>) {
    let status = Status::from(answer.unwrap_err());
    assert_eq!(status.code, Code::UNIMPLEMENTED, "{status}");
    assert!(status.message.starts_with(what), "{status}");
}

#[tokio::test]
async fn capabilities_are_refused_where_there_is_no_acrn() {
    let output = Command::new(LAUNCHER).args(["capabilities", "--hypervisor"]).arg(acrn_dm()).output().await.unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && words.contains("not the Service VM of an ACRN hypervisor"), "{words}");
}

/// Its devices are two, for this thread and the launcher that it starts.
#[tokio::test]
async fn capabilities_are_told_on_a_service_vm() {
    let (dir, nothing) = (tempfile::tempdir().unwrap(), None::<&str>);
    fs::write(dir.path().join("acrn_hsm"), "").unwrap();
    fs::write(dir.path().join("null"), "").unwrap();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(nothing, "/", nothing, MsFlags::MS_PRIVATE | MsFlags::MS_REC, nothing).unwrap();
    mount(Some("/dev/null"), &dir.path().join("null"), nothing, MsFlags::MS_BIND, nothing).unwrap();
    mount(Some(dir.path()), "/dev", nothing, MsFlags::MS_BIND | MsFlags::MS_REC, nothing).unwrap();
    let acrn = Acrn::start().await;
    let hypervisor_path = acrn_dm().to_str().unwrap().into();
    let request = vmm::CapabilitiesRequest { hypervisor_path, ..Default::default() };
    let told: CapabilitiesResponse = acrn.client.capabilities(deadline(LIMIT), &request).await.unwrap();
    assert_eq!(told.version, "3.3-2024-10-15 16:00:00 (tag: acrn-2024w42)");
    assert_eq!(told.devices, ["block", "net", "vsock", "rng", "console"]);
    assert_eq!(told.hotplug, ["block"]);
    assert_eq!(told.missing["pause"], "acrn-dm cannot pause its guest");
}
