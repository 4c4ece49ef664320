//! A VM that is written to a directory, and goes on as another.

use std::{fs, path::Path, time::Duration};

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{
        CreateRequest, Device, Fs, PauseRequest, Pmem, RestoreRequest, RestoreResponse, ResumeRequest, SnapshotRequest,
        VmState, Vsock, device::Kind,
    },
};

use caisson_testbed::skip;

use crate::{
    fixture::{Backend, Images, LIMIT, Launcher, children, device, for_backend, text},
    integrity::{self, PORT, assert_all_arrived, ended, exchange_over_vsock},
    memory::free_huge_pages,
};

for_backend!(
    qemu,
    Qemu,
    a_restored_guest_of_microvm_goes_on_where_it_was,
    a_restored_guest_of_q35_goes_on_where_it_was,
    a_restored_guest_is_saved_again,
    a_restored_guest_is_reached_by_its_new_vsock,
    a_guest_with_hybrid_vsock_is_not_saved,
    a_guest_with_a_pmem_image_is_not_saved,
    a_running_guest_is_not_saved,
    a_guest_is_saved_to_an_empty_directory_only,
    a_guest_with_a_shared_folder_is_not_saved,
    what_is_no_snapshot_is_refused
);
for_backend!(
    cloud_hypervisor,
    CloudHypervisor,
    a_restored_guest_goes_on_where_it_was,
    a_restored_guest_is_saved_again,
    a_running_guest_is_not_saved,
    a_guest_is_saved_to_an_empty_directory_only,
    a_restored_guest_is_reached_by_its_new_vsock
);
for_backend!(
    firecracker,
    Firecracker,
    a_restored_guest_goes_on_where_it_was,
    a_restored_guest_is_saved_again,
    a_running_guest_is_not_saved,
    a_guest_is_saved_to_an_empty_directory_only,
    a_guest_of_huge_pages_is_not_saved,
    a_restored_guest_is_reached_by_its_new_vsock
);
for_backend!(stratovirt, StratoVirt, no_guest_is_saved);
for_backend!(builtin, Builtin, no_guest_is_saved);

/// Saves the guest that runs, whose VM ends by it.
pub async fn save(launcher: &Launcher, snapshot: &Path) {
    fs::create_dir(snapshot).unwrap();
    launcher.client.pause(deadline(LIMIT), &PauseRequest::new()).await.unwrap();
    let directory = SnapshotRequest { directory: text(snapshot), ..Default::default() };
    launcher.client.snapshot(deadline(LIMIT), &directory).await.unwrap();
    launcher.stop(Duration::ZERO).await;
}

/// Makes the VM again that was made by `request`, paused, with `devices` of this launcher's.
pub async fn restore(
    launcher: &Launcher,
    snapshot: &Path,
    request: CreateRequest,
    devices: Vec<Device>,
) -> RestoreResponse {
    let mut vm = request.vm.unwrap();
    vm.devices = devices;
    let restore = RestoreRequest {
        run_dir: text(&launcher.run_dir()),
        directory: text(snapshot),
        vm: Some(vm).into(),
        options: request.options,
        ..Default::default()
    };
    launcher.client.restore(deadline(LIMIT), &restore).await.unwrap()
}

async fn a_restored_guest_goes_on_where_it_was(backend: Backend) {
    goes_on_where_it_was(backend, "").await;
}

async fn a_restored_guest_of_microvm_goes_on_where_it_was(backend: Backend) {
    goes_on_where_it_was(backend, "\nmachine_type = \"microvm\"").await;
}

async fn a_restored_guest_of_q35_goes_on_where_it_was(backend: Backend) {
    goes_on_where_it_was(backend, "\nmachine_type = \"q35\"").await;
}

async fn goes_on_where_it_was(backend: Backend, options: &str) {
    let Some(images) = Images::find() else { return };
    restored(backend, &images, options).await;
}

async fn a_restored_guest_is_saved_again(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let again = restored(backend, &images, "").await;
    save(&again, &images.dir.path().join("again")).await;
}

/// A guest that was saved and goes on.
async fn restored(backend: Backend, images: &Images, options: &str) -> Launcher {
    let snapshot = images.dir.path().join("snapshot");
    let first = Launcher::start(backend).await;
    let mut request = first.request(images, "tick");
    request.options += options;
    request.vm.as_mut().unwrap().devices = vec![first.logged_console()];
    first.create(&request).await.unwrap();
    first.boot().await.unwrap();
    first.until_console_has("guest: tick").await;
    save(&first, &snapshot).await;

    let second = Launcher::start(backend).await;
    restore(&second, &snapshot, request, vec![second.logged_console()]).await;
    assert_eq!(second.state().await.state, VmState::PAUSED.into());
    second.client.resume(deadline(LIMIT), &ResumeRequest::new()).await.unwrap();

    second.until_console_has("guest: tick").await;
    assert!(!second.heard().contains("guest: up"));
    second
}

/// Who listened in the guest still does. Connections that are made before the guest has noticed that its vsock is another
/// one are lost: it has when it says something.
async fn a_restored_guest_is_reached_by_its_new_vsock(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let snapshot = images.dir.path().join("snapshot");
    let first = Launcher::start(backend).await;
    let script = format!("while sleep 1; do echo guest: tick; done &\nguest-load vsock {PORT} 1");
    let request = integrity::request(&first, &images, &script, &[("vsock", vsock(&first))]);
    let created = first.create(&request).await.unwrap();
    if backend == Backend::Qemu && created.devices[1].address.starts_with("hvsock:") {
        return skip("QEMU saves a guest with the host's vsock only, and this machine has no /dev/vhost-vsock");
    }
    first.boot().await.unwrap();
    first.until_console_has("guest: listening").await;
    save(&first, &snapshot).await;

    let second = Launcher::start(backend).await;
    let devices = vec![second.logged_console(), device("vsock", vsock(&second))];
    let restored = restore(&second, &snapshot, request, devices).await;
    second.client.resume(deadline(LIMIT), &ResumeRequest::new()).await.unwrap();

    second.until_console_has("guest: tick").await;
    exchange_over_vsock(&restored.devices[1].address.parse().unwrap(), 1).await;
    assert_all_arrived(&ended(&second).await);
}

/// Where the host has a vsock of its own, the guest gets that one.
async fn a_guest_with_hybrid_vsock_is_not_saved(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.vm.as_mut().unwrap().devices = vec![device("vsock", vsock(&launcher))];
    let created = launcher.create(&request).await.unwrap();
    if !created.devices[0].address.starts_with("hvsock:") {
        return skip("this machine has a vsock of its own");
    }
    let status = refusal(&launcher, &images).await;
    assert_eq!(status.code, Code::UNIMPLEMENTED);
    assert!(status.message.contains("load the module vhost_vsock"), "{status}");
}

fn vsock(launcher: &Launcher) -> Kind {
    Kind::Vsock(Vsock { socket: text(&launcher.dir.path().join("vsock.sock")), ..Default::default() })
}

async fn a_guest_with_a_pmem_image_is_not_saved(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let path = images.dir.path().join("memory");
    fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
    let mut request = launcher.request(&images, "sleep");
    request.options += "\nmachine_type = \"q35\"";
    request.vm.as_mut().unwrap().devices =
        vec![device("memory", Kind::Pmem(Pmem { path: text(&path), ..Default::default() }))];
    launcher.create(&request).await.unwrap();
    let status = refusal(&launcher, &images).await;
    assert_eq!(status.code, Code::UNIMPLEMENTED);
    assert!(status.message.starts_with("a VM with a pmem image cannot be saved: "), "{status}");
}

async fn no_guest_is_saved(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    let status = refusal(&launcher, &images).await;
    assert_eq!(
        status,
        Status::new(Code::UNIMPLEMENTED, format!("a snapshot is not supported with {}", backend.name()))
    );
}

async fn a_running_guest_is_not_saved(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    launcher.boot().await.unwrap();
    let status = refusal(&launcher, &images).await;
    assert_eq!(status, Status::new(Code::FAILED_PRECONDITION, "cannot snapshot a VM that is running"));
}

async fn a_guest_is_saved_to_an_empty_directory_only(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.client.pause(deadline(LIMIT), &PauseRequest::new()).await.unwrap();
    let request = SnapshotRequest { directory: text(images.dir.path()), ..Default::default() };
    let status = Status::from(launcher.client.snapshot(deadline(LIMIT), &request).await.unwrap_err());
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.ends_with(" is not empty"), "{status}");
}

async fn a_guest_of_huge_pages_is_not_saved(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.vm.as_mut().unwrap().huge_pages = true;
    if let Err(refusal) = launcher.create(&request).await {
        return assert!(free_huge_pages() < 96, "{refusal}");
    }
    launcher.boot().await.unwrap();
    launcher.client.pause(deadline(LIMIT), &PauseRequest::new()).await.unwrap();
    let status = refusal(&launcher, &images).await;
    assert_eq!(status.code, Code::UNIMPLEMENTED);
    assert!(status.message.starts_with("a VM of huge pages cannot be saved: "), "{status}");
}

async fn a_guest_with_a_shared_folder_is_not_saved(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    let daemon_path = text(&images.virtiofsd);
    let fs = Fs { tag: "share".into(), shared_dir: "/tmp".into(), daemon_path, ..Default::default() };
    request.vm.as_mut().unwrap().devices = vec![device("fs", Kind::Fs(fs))];
    launcher.create(&request).await.unwrap();
    let status = refusal(&launcher, &images).await;
    assert_eq!(status.code, Code::UNIMPLEMENTED);
    assert!(status.message.starts_with("a VM that shares a folder cannot be saved: "), "{status}");
}

/// The answer to a snapshot, which leaves nothing.
async fn refusal(launcher: &Launcher, images: &Images) -> Status {
    let directory = images.dir.path().join("snapshot");
    fs::create_dir(&directory).unwrap();
    let request = SnapshotRequest { directory: text(&directory), ..Default::default() };
    let status = Status::from(launcher.client.snapshot(deadline(LIMIT), &request).await.unwrap_err());
    assert_eq!(fs::read_dir(directory).unwrap().count(), 0);
    status
}

async fn what_is_no_snapshot_is_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let request = launcher.request(&images, "sleep");
    let mut restore = RestoreRequest {
        run_dir: text(&launcher.run_dir()),
        directory: text(images.dir.path()),
        vm: request.vm,
        options: request.options,
        ..Default::default()
    };
    let missing = Status::from(launcher.client.restore(deadline(LIMIT), &restore).await.unwrap_err());
    assert_eq!(missing.code, Code::INVALID_ARGUMENT);
    assert!(missing.message.starts_with(&format!("open the snapshot {}/", images.dir.path().display())), "{missing}");

    fs::write(images.dir.path().join("qemu.migration"), "no machine").unwrap();
    let launcher = Launcher::start(backend).await;
    restore.run_dir = text(&launcher.run_dir());
    let broken = Status::from(launcher.client.restore(deadline(LIMIT), &restore).await.unwrap_err());
    assert_eq!(broken.code, Code::UNAVAILABLE);
    assert!(broken.message.contains("migration"), "{broken}");
    assert_eq!(children(launcher.child.id().unwrap()), Vec::<u32>::new());
}
