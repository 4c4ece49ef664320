//! What a guest finds in its VM.

use std::fs;

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{
        self, AttachRequest, Balloon, Block, CreateRequest, DetachRequest, ExitReason, Fs, Rng, Vsock, device::Kind,
    },
};

use crate::fixture::{Backend, Images, LIMIT, Launcher, device, for_backend, for_each_backend, text};

for_each_backend!(what_is_known_of_a_vm_is_counted);
for_backend!(
    qemu_only,
    Qemu,
    a_guest_on_microvm_finds_its_devices,
    a_guest_on_q35_finds_its_devices,
    a_disk_comes_and_goes_while_q35_runs,
    as_many_disks_come_as_are_likely_to,
    a_disk_cannot_come_while_microvm_runs
);
for_backend!(
    builtin_only,
    Builtin,
    a_guest_finds_its_devices,
    a_guest_finds_what_the_vmm_itself_shares,
    what_devices_do_is_counted
);
for_backend!(
    cloud_hypervisor_only,
    CloudHypervisor,
    a_guest_of_cloud_hypervisor_finds_its_devices,
    a_disk_comes_and_goes_while_cloud_hypervisor_runs,
    a_disk_stays_whole_when_another_is_to_have_its_name,
    what_devices_do_is_counted
);
for_backend!(
    stratovirt_only,
    StratoVirt,
    a_guest_of_stratovirt_finds_its_devices,
    a_disk_of_stratovirt_is_filled_and_emptied
);
for_backend!(
    firecracker_only,
    Firecracker,
    a_disk_of_firecracker_is_filled_and_emptied,
    a_disk_stays_whole_when_another_is_to_have_its_name,
    a_shared_directory_cannot_be_had_with_firecracker
);

fn disk(images: &Images, name: &str, read_only: bool) -> Kind {
    let path = images.dir.path().join(name);
    fs::write(&path, [0; 4096]).unwrap();
    Kind::Block(Block { path: text(&path), read_only, ..Default::default() })
}

/// One of each.
fn with_devices(launcher: &Launcher, images: &Images, options: &str) -> CreateRequest {
    let shared = images.dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("hello"), "hello").unwrap();
    let mut request = launcher.request(images, "list");
    request.options += &format!("\n{options}");
    let vsock = Vsock { socket: text(&launcher.dir.path().join("vsock.sock")), ..Default::default() };
    let fs = Fs {
        tag: "share".into(),
        shared_dir: text(&shared),
        daemon_path: text(&images.virtiofsd),
        cache: "never".into(),
        ..Default::default()
    };
    request.vm.as_mut().unwrap().devices = vec![
        device("first", disk(images, "first", true)),
        device("second", disk(images, "second", false)),
        device("vsock", Kind::Vsock(vsock)),
        device("fs", Kind::Fs(fs)),
        device("rng", Kind::Rng(Rng { source: "/dev/urandom".into(), ..Default::default() })),
        device("balloon", Kind::Balloon(Balloon { free_page_reporting: true, ..Default::default() })),
    ];
    request
}

async fn finds_its_devices(backend: Backend, options: &str) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let request = with_devices(&launcher, &images, options);
    let created = launcher.create(&request).await.unwrap();
    let addresses: Vec<_> = created.devices.iter().map(|device| device.address.as_str()).collect();
    assert_eq!(addresses[..2], ["serial:first", "serial:second"]);
    assert!(addresses[2].starts_with("hvsock:/") || addresses[2].starts_with("vsock:"), "{}", addresses[2]);
    assert_eq!(addresses[3..], ["tag:share", "", ""]);
    launcher.boot().await.unwrap();

    let exit = launcher.wait().await;

    assert_eq!(exit.reason, ExitReason::GUEST_SHUTDOWN.into(), "{exit}");
    assert!(exit.console_tail.contains("guest: vda is first read-only 1"), "{exit}");
    assert!(exit.console_tail.contains("guest: vdb is second read-only 0"), "{exit}");
    assert!(exit.console_tail.contains("guest: shared hello"), "{exit}");
    assert_eq!(fs::read_to_string(images.dir.path().join("shared/answer")).unwrap(), "written\n");
    assert!(launcher.leftovers().is_empty());
    assert!(!launcher.dir.path().join("vsock.sock").exists());
}

async fn a_guest_on_microvm_finds_its_devices(backend: Backend) {
    finds_its_devices(backend, "machine_type = \"microvm\"").await;
}

async fn a_guest_on_q35_finds_its_devices(backend: Backend) {
    finds_its_devices(backend, "machine_type = \"q35\"").await;
}

async fn a_guest_finds_its_devices(backend: Backend) {
    finds_its_devices(backend, "block_io = \"thread\"").await;
}

async fn a_guest_finds_what_the_vmm_itself_shares(backend: Backend) {
    finds_its_devices(backend, "file_server = \"builtin\"").await;
}

async fn a_disk_comes_and_goes_while_q35_runs(backend: Backend) {
    a_disk_comes_and_goes(backend, "\nmachine_type = \"q35\"").await;
}

async fn a_disk_comes_and_goes_while_cloud_hypervisor_runs(backend: Backend) {
    a_disk_comes_and_goes(backend, "").await;
}

async fn a_guest_of_cloud_hypervisor_finds_its_devices(backend: Backend) {
    finds_its_devices(backend, "").await;
}

async fn a_guest_of_stratovirt_finds_its_devices(backend: Backend) {
    finds_its_devices(backend, "").await;
}

async fn a_disk_of_firecracker_is_filled_and_emptied(backend: Backend) {
    a_disk_is_filled_and_emptied(backend, "spare_read_only_disks = 1\nspare_writable_disks = 1", "0 ").await;
}

async fn a_disk_of_stratovirt_is_filled_and_emptied(backend: Backend) {
    a_disk_is_filled_and_emptied(backend, "", "0 0 0 ").await;
}

/// Its disks are there from the start, and empty; `others` stay so.
async fn a_disk_is_filled_and_emptied(backend: Backend, options: &str, others: &str) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "watch-sizes");
    request.options = options.into();
    let (empty, filled) = (format!("guest: sizes 0 {others}"), format!("guest: sizes 8 {others}"));
    request.vm.as_mut().unwrap().devices = vec![launcher.logged_console()];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has(&empty).await;

    let attach =
        AttachRequest { device: Some(device("late", disk(&images, "late", true))).into(), ..Default::default() };
    let attached = launcher.client.attach(deadline(LIMIT), &attach).await.unwrap();
    assert!(attached.device.address.starts_with("serial:"), "{attached}");
    launcher.until_console_has(&filled).await;

    let detach = DetachRequest { id: "late".into(), ..Default::default() };
    launcher.client.detach(deadline(LIMIT), &detach).await.unwrap();
    launcher.until_console_has(&format!("{filled}\r\n{empty}")).await;
}

async fn a_shared_directory_cannot_be_had_with_firecracker(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let request = with_devices(&launcher, &images, "");
    let status = launcher.create(&request).await.unwrap_err();
    assert_eq!(status, Status::new(Code::UNIMPLEMENTED, "Firecracker has no fs device"));
}

async fn a_disk_comes_and_goes(backend: Backend, options: &str) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "watch");
    request.options += options;
    request.vm.as_mut().unwrap().devices = vec![launcher.logged_console()];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: disks ").await;

    let attach =
        AttachRequest { device: Some(device("late", disk(&images, "late", true))).into(), ..Default::default() };
    let attached = launcher.client.attach(deadline(LIMIT), &attach).await.unwrap();
    assert_eq!(attached.device.address, "serial:late");
    launcher.until_console_has("guest: disks late").await;

    let detach = DetachRequest { id: "late".into(), ..Default::default() };
    launcher.client.detach(deadline(LIMIT), &detach).await.unwrap();
    launcher.until_console_has("guest: disks late\r\nguest: disks ").await;
    let twice = Status::from(launcher.client.detach(deadline(LIMIT), &detach).await.unwrap_err());
    assert_eq!(twice.code, Code::INVALID_ARGUMENT);
}

async fn as_many_disks_come_as_are_likely_to(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "watch");
    request.options += "\nmachine_type = \"q35\"\nhotplug_slots = 0";
    let vm = request.vm.as_mut().unwrap();
    (vm.devices, vm.spare_disks) = (vec![launcher.logged_console()], 10);
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: disks ").await;

    for number in 0..10 {
        let id = format!("late-{number}");
        let attach = AttachRequest { device: Some(device(&id, disk(&images, &id, true))).into(), ..Default::default() };
        launcher.client.attach(deadline(LIMIT), &attach).await.unwrap();
        launcher.until_console_has(&id).await;
    }
}

async fn a_disk_stays_whole_when_another_is_to_have_its_name(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    if backend == Backend::Firecracker {
        request.options += "spare_writable_disks = 1";
    }
    request.vm.as_mut().unwrap().devices =
        vec![launcher.logged_console(), device("data", disk(&images, "data", false))];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: up").await;

    let other = device("data", disk(&images, "other", false));
    let attach = AttachRequest { device: Some(other).into(), ..Default::default() };
    let status = Status::from(launcher.client.attach(deadline(LIMIT), &attach).await.unwrap_err());
    assert_eq!(status, Status::new(Code::INVALID_ARGUMENT, "the VM has a device \"data\" already"));
    assert_eq!(fs::metadata(images.dir.path().join("data")).unwrap().len(), 4096);
}

async fn a_disk_cannot_come_while_microvm_runs(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    let attach =
        AttachRequest { device: Some(device("late", disk(&images, "late", true))).into(), ..Default::default() };
    let status = Status::from(launcher.client.attach(deadline(LIMIT), &attach).await.unwrap_err());
    assert_eq!(status.code, Code::UNIMPLEMENTED);
    assert!(status.message.contains("q35"), "{status}");
}

async fn what_is_known_of_a_vm_is_counted(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    let metrics = launcher.client.metrics(deadline(LIMIT), &vmm::MetricsRequest::new()).await.unwrap().text;
    assert!(metrics.contains("\ncaisson_vm_console_bytes_total 0\n"), "{metrics}");
    assert!(metrics.contains("\ncaisson_vm_memory_bytes 201326592\n"), "{metrics}");
}

async fn what_devices_do_is_counted(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "watch");
    request.vm.as_mut().unwrap().devices = vec![launcher.logged_console(), device("data", disk(&images, "data", true))];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: disks data").await;
    let metrics = launcher.client.metrics(deadline(LIMIT), &vmm::MetricsRequest::new()).await.unwrap().text;
    let read = "\ncaisson_vm_block_read_bytes_total{device=\"data\"} ";
    let (_, read) = metrics.split_once(read).unwrap_or_else(|| panic!("{metrics}"));
    // The kernel looks for partitions.
    assert!(!read.starts_with("0\n"), "{metrics}");
}
