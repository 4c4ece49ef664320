//! Network cards: they come and go, are restored, and no hypervisor needs a right to the network for them where it takes
//! an open tap.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use crate::{
    fixture::{Backend, Images, LIMIT, Launcher, children, device, for_backend, for_each_backend, kvm, text},
    integrity::{self, assert_all_arrived, card_keeps_every_byte, ended},
    network::{self, GUEST_SETUP, HOST, MAC, card, card_device},
    snapshot::{restore, save},
};
use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{AttachRequest, DetachRequest, ResumeRequest},
};

for_each_backend!(a_guest_finds_the_card_on_its_tap);
for_backend!(
    qemu_only,
    Qemu,
    a_card_works_where_its_tap_is_not,
    a_card_uses_vhost_net_where_kvm_and_the_host_have_it,
    two_pairs_on_a_tap_with_one_queue_are_refused,
    a_card_comes_and_goes_while_q35_runs,
    a_restored_guest_of_microvm_has_its_card_on_another_tap,
    a_restored_guest_of_q35_has_its_card_on_another_tap,
);
for_backend!(
    cloud_hypervisor_only,
    CloudHypervisor,
    a_jailed_hypervisor_cannot_open_a_tap_itself,
    two_pairs_on_a_tap_with_one_queue_are_refused,
    a_card_comes_and_goes_while_cloud_hypervisor_runs,
    a_restored_guest_has_its_card_on_another_tap,
);
for_backend!(firecracker_only, Firecracker, a_restored_guest_has_its_card_on_another_tap);
for_backend!(
    stratovirt_only,
    StratoVirt,
    a_card_works_where_its_tap_is_not,
    a_card_neither_comes_nor_goes_while_stratovirt_runs,
);
for_backend!(builtin_only, Builtin, two_pairs_on_a_tap_with_one_queue_are_refused);

async fn a_guest_finds_the_card_on_its_tap(backend: Backend) {
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "list");
    request.vm.as_mut().unwrap().devices = vec![card_device()];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    let exit = launcher.wait().await;
    assert!(exit.console_tail.contains(&format!("guest: card {MAC}")), "{exit}");
}

/// The hypervisor is in another network namespace than the launcher.
async fn a_card_works_where_its_tap_is_not(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let program = match backend.hypervisor().unwrap() {
        none if none.is_empty() => "/usr/bin/qemu-system-x86_64".into(),
        program => program,
    };
    let elsewhere = images.dir.path().join("elsewhere");
    fs::write(&elsewhere, format!("#!/bin/sh\nexec unshare --net {program} \"$@\"\n")).unwrap();
    fs::set_permissions(&elsewhere, PermissionsExt::from_mode(0o755)).unwrap();
    card_keeps_every_byte(backend, &images, 1, |vm| vm.hypervisor_path = text(&elsewhere)).await;
}

async fn a_card_uses_vhost_net_where_kvm_and_the_host_have_it(backend: Backend) {
    const VHOST_NET: &str = "/dev/vhost-net";
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.vm.as_mut().unwrap().devices = vec![card_device()];
    let pid = launcher.create(&request).await.unwrap().pid;
    let mut open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let uses_it = open.any(|open| fs::read_link(open.path()).is_ok_and(|file| file == Path::new(VHOST_NET)));
    assert_eq!(uses_it, kvm().is_ok() && Path::new(VHOST_NET).exists());
}

async fn a_jailed_hypervisor_cannot_open_a_tap_itself(backend: Backend) {
    const CAP_NET_ADMIN: u64 = 1 << 12;
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.vm.as_mut().unwrap().devices = vec![card_device()];
    let pid = launcher.create(&request).await.unwrap().pid;
    assert!(!Path::new(&format!("/proc/{pid}/root/dev/net/tun")).exists());
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let held = status.lines().find_map(|line| line.strip_prefix("CapPrm:")).unwrap();
    assert_eq!(u64::from_str_radix(held.trim(), 16).unwrap() & CAP_NET_ADMIN, 0);
}

async fn two_pairs_on_a_tap_with_one_queue_are_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.vm.as_mut().unwrap().devices = vec![device("net", card("tap0", 2))];
    let status = launcher.create(&request).await.unwrap_err();
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    let expected =
        "the tap interface tap0 cannot be used: it is not a tap interface with several queues: make it with ";
    assert!(status.message.starts_with(expected), "{status}");
    assert_eq!(children(launcher.child.id().unwrap()), Vec::<u32>::new());
    assert!(launcher.leftovers().is_empty());
}

async fn a_card_comes_and_goes_while_q35_runs(backend: Backend) {
    a_card_comes_and_goes(backend, "\nmachine_type = \"q35\"").await;
}

async fn a_card_comes_and_goes_while_cloud_hypervisor_runs(backend: Backend) {
    a_card_comes_and_goes(backend, "").await;
}

async fn a_card_comes_and_goes(backend: Backend, options: &str) {
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "watch-cards");
    request.options += options;
    request.vm.as_mut().unwrap().devices = vec![launcher.logged_console()];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has(&cards_at(1)).await;

    // The hypervisor lets go of the tap with the card, so that it can be had again.
    for change in [2, 4] {
        attach(&launcher, "tap0").await.unwrap();
        launcher.until_console_has(&cards_at(change)).await;
        let busy = attach_as("other", &launcher, "tap0").await.unwrap_err();
        assert!(busy.message.starts_with("the tap interface tap0 cannot be used: another program uses it"), "{busy}");
        detach(&launcher).await.unwrap();
        launcher.until_console_has(&cards_at(change + 1)).await;
    }
}

/// What a guest writes that watches its cards, when that of [`attach`] comes and goes: first it has none.
pub fn cards_at(change: u32) -> String {
    let card = if change.is_multiple_of(2) { format!("{MAC} ") } else { String::new() };
    format!("guest: cards {change}: {card}\r\n")
}

/// Gives the running guest a card, "net".
pub async fn attach(launcher: &Launcher, tap: &str) -> Result<(), Status> {
    attach_as("net", launcher, tap).await
}

async fn attach_as(id: &str, launcher: &Launcher, tap: &str) -> Result<(), Status> {
    let attach = AttachRequest { device: Some(device(id, card(tap, 1))).into(), ..Default::default() };
    launcher.client.attach(deadline(LIMIT), &attach).await.map(drop).map_err(Status::from)
}

/// Takes that card away.
pub async fn detach(launcher: &Launcher) -> Result<(), Status> {
    let detach = DetachRequest { id: "net".into(), ..Default::default() };
    launcher.client.detach(deadline(LIMIT), &detach).await.map(drop).map_err(Status::from)
}

async fn a_card_neither_comes_nor_goes_while_stratovirt_runs(backend: Backend) {
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    network::make_tap("tap1", &[]);
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.vm.as_mut().unwrap().devices = vec![card_device()];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    let refused = attach_as("other", &launcher, "tap1").await.unwrap_err();
    assert_eq!(refused.code, Code::UNIMPLEMENTED, "{refused}");
    let refused = detach(&launcher).await.unwrap_err();
    assert_eq!(refused.message, "no device was attached as \"net\" while the VM ran");
}

/// A guest tries until the host listens.
fn dial() -> String {
    format!("{GUEST_SETUP}\necho guest: dials\nuntil guest-load connect {HOST} 1; do usleep 100000; done")
}

async fn a_restored_guest_of_microvm_has_its_card_on_another_tap(backend: Backend) {
    has_its_card_on_another_tap(backend, "\nmachine_type = \"microvm\"").await;
}

async fn a_restored_guest_of_q35_has_its_card_on_another_tap(backend: Backend) {
    has_its_card_on_another_tap(backend, "\nmachine_type = \"q35\"").await;
}

async fn a_restored_guest_has_its_card_on_another_tap(backend: Backend) {
    has_its_card_on_another_tap(backend, "").await;
}

async fn has_its_card_on_another_tap(backend: Backend, options: &str) {
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    network::reach_host_through("tap0");
    let snapshot = images.dir.path().join("snapshot");
    let first = Launcher::start(backend).await;
    // Nobody listens until it is another VM.
    let mut request = integrity::request(&first, &images, &dial(), &[("net", card("tap0", 1))]);
    request.options += options;
    first.create(&request).await.unwrap();
    first.boot().await.unwrap();
    first.until_console_has("guest: dials").await;
    save(&first, &snapshot).await;
    network::ip(&["link", "delete", "tap0"]);
    network::make_tap("tap1", &[]);
    let listener = network::listen("tap1").await;

    let second = Launcher::start(backend).await;
    restore(&second, &snapshot, request, vec![second.logged_console(), device("net", card("tap1", 1))]).await;
    let exchanged = integrity::exchange(listener, 1);
    second.client.resume(deadline(LIMIT), &ResumeRequest::new()).await.unwrap();

    assert_all_arrived(&ended(&second).await);
    exchanged.await.unwrap().unwrap();
}
