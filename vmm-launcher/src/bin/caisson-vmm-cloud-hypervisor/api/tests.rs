//! What is sent, against a fake that refuses as Cloud Hypervisor does.

use std::{fs::File, os::fd::OwnedFd, path::Path};

use caisson_protocol::vmm::{
    Balloon, Block, CapabilitiesResponse, Device, Fs, Net, Pmem, Rng, Vfio, VmConfig, VmState, Vsock, device::Kind,
};

use super::{Api, fake::Fake};
use crate::{
    configuration::{Configuration, hotpluggable},
    options::Options,
    probe::{abilities, devices},
};

async fn api() -> Api {
    Api::over(Fake::serve()).await.unwrap()
}

fn device(id: &str, kind: Kind) -> Device {
    Device { id: id.into(), kind: Some(kind), ..Default::default() }
}

fn disk(id: &str) -> Device {
    device(id, Kind::Block(Block { path: "/disk".into(), ..Default::default() }))
}

fn share(id: &str) -> Device {
    device(id, Kind::Fs(Fs { tag: id.into(), ..Default::default() }))
}

fn vm(devices: Vec<Device>) -> VmConfig {
    VmConfig { vcpus: 2, max_vcpus: 4, memory_mib: 256, max_memory_mib: 512, devices, ..Default::default() }
}

fn card(queue_pairs: u32) -> Device {
    let net = Net { tap: "tap0".into(), mac: "02:00:00:00:00:01".into(), queue_pairs, ..Default::default() };
    device("net", Kind::Net(net))
}

/// What stands for open taps here.
fn taps(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
}

async fn created(devices: Vec<Device>) -> Api {
    let configuration = Configuration::of(&vm(devices), &Options::default(), true, Path::new("/run/vm")).unwrap();
    let api = api().await;
    api.create(&configuration.body).await.unwrap();
    api
}

#[tokio::test]
async fn a_vm_with_every_device_lives_through_everything() {
    let api = created(vec![
        disk("root"),
        device("vsock", Kind::Vsock(Vsock { socket: "/s".into(), ..Default::default() })),
        share("share"),
        device("pmem", Kind::Pmem(Pmem { path: "/p".into(), ..Default::default() })),
        device("balloon", Kind::Balloon(Balloon { free_page_reporting: true, ..Default::default() })),
        device("rng", Kind::Rng(Rng { source: "/dev/urandom".into(), ..Default::default() })),
    ])
    .await;
    assert_eq!(api.ping().await.unwrap(), "v53.0");
    let (list, body) = hotpluggable(&card(2)).unwrap();
    api.add(list, &body, taps(2)).await.unwrap();
    api.boot().await.unwrap();
    for late in [disk("late"), share("late-share")] {
        let (list, body) = hotpluggable(&late).unwrap();
        api.add(list, &body, Vec::new()).await.unwrap();
    }
    api.remove_device("late").await.unwrap();
    api.resize_vcpus(4).await.unwrap();
    api.resize_memory(512).await.unwrap();
    api.resize_memory(512).await.unwrap();
    assert_eq!(api.resize_balloon(64).await.unwrap(), 64);
    assert_eq!(api.memory_mib().await.unwrap(), 512);
    assert_eq!(api.counters().await.unwrap()["root"]["read_bytes"], 512);
    api.pause().await.unwrap();
    api.snapshot("/snapshot").await.unwrap();
    api.resume().await.unwrap();
    api.press_power_button().await.unwrap();
}

#[tokio::test]
async fn a_device_of_the_host_has_its_place_once_there_is_a_guest() {
    let gpu = |id| device(id, Kind::Vfio(Vfio { address: "0000:41:00.0".into(), ..Default::default() }));
    let api = created(vec![gpu("first")]).await;
    let (list, body) = hotpluggable(&gpu("first")).unwrap();
    assert_eq!(api.add(list, &body, Vec::new()).await.unwrap(), None);
    api.boot().await.unwrap();
    let (list, body) = hotpluggable(&gpu("late")).unwrap();
    assert_eq!(api.add(list, &body, Vec::new()).await.unwrap().as_deref(), Some("0000:00:09.0"));
    assert!(api.add(list, &body, Vec::new()).await.is_err());
    api.remove_device("late").await.unwrap();
}

#[tokio::test]
async fn a_card_needs_a_tap_for_each_pair_of_queues() {
    let api = created(Vec::new()).await;
    let (list, body) = hotpluggable(&card(2)).unwrap();
    assert!(api.add(list, &body, taps(1)).await.is_err());
    assert!(api.add(list, &body, Vec::new()).await.is_err());
    api.add(list, &body, taps(2)).await.unwrap();
}

#[tokio::test]
async fn a_snapshot_becomes_a_paused_vm() {
    let api = api().await;
    api.restore("/snapshot", Vec::new()).await.unwrap();
    api.resume().await.unwrap();
}

#[tokio::test]
async fn the_cards_of_a_snapshot_get_other_taps() {
    api().await.restore("/snapshot", vec![("a".into(), taps(1)), ("b".into(), taps(2))]).await.unwrap();
}

#[tokio::test]
async fn a_refusal_is_told_with_its_causes() {
    let refusal = api().await.boot().await.unwrap_err().to_string();
    assert_eq!(refusal, "Cloud Hypervisor's PUT /api/v1/vm.boot: Error from API: VM config is missing");
}

#[tokio::test]
async fn a_paused_vm_is_not_paused_again() {
    let api = created(Vec::new()).await;
    api.boot().await.unwrap();
    api.pause().await.unwrap();
    assert!(api.pause().await.is_err());
}

#[tokio::test]
async fn a_running_guest_is_not_written() {
    let api = created(Vec::new()).await;
    api.boot().await.unwrap();
    assert!(api.snapshot("/snapshot").await.is_err());
}

#[tokio::test]
async fn what_it_does_is_told_from_its_creation_on() {
    let api = created(Vec::new()).await;
    assert_eq!(api.state().await.unwrap(), VmState::CREATED);
    assert_eq!(api.memory_mib().await.unwrap(), 256);
    api.boot().await.unwrap();
    assert_eq!(api.state().await.unwrap(), VmState::RUNNING);
    api.pause().await.unwrap();
    assert_eq!(api.state().await.unwrap(), VmState::PAUSED);
}

#[tokio::test]
async fn landlock_is_in_force_where_it_was_asked_for() {
    for landlock in [true, false] {
        let api = api().await;
        let configuration = Configuration::of(&vm(Vec::new()), &Options::default(), landlock, Path::new("/run/vm"));
        api.create(&configuration.unwrap().body).await.unwrap();
        assert_eq!(api.is_confined().await.unwrap(), landlock);
    }
}

#[tokio::test]
async fn a_share_cannot_come_to_a_guest_whose_memory_is_its_own() {
    let api = created(Vec::new()).await;
    api.boot().await.unwrap();
    let (list, body) = hotpluggable(&share("late")).unwrap();
    let refusal = api.add(list, &body, Vec::new()).await.unwrap_err().to_string();
    assert!(refusal.ends_with("requires using shared memory or huge pages"), "{refusal}");
}

#[tokio::test]
async fn two_devices_have_two_names() {
    let api = created(vec![disk("root")]).await;
    api.boot().await.unwrap();
    let (list, body) = hotpluggable(&disk("root")).unwrap();
    assert!(api.add(list, &body, Vec::new()).await.is_err());
    assert!(api.remove_device("nothing").await.is_err());
}

#[tokio::test]
async fn a_guest_does_not_outgrow_its_limits() {
    let api = created(Vec::new()).await;
    api.boot().await.unwrap();
    assert!(api.resize_vcpus(5).await.is_err());
    assert!(api.resize_memory(128).await.is_err());
}

async fn able(stream: tokio::net::UnixStream) -> CapabilitiesResponse {
    let mut told = CapabilitiesResponse { version: "30.0".into(), ..Default::default() };
    abilities(&Api::over(stream).await.unwrap(), &mut told).await.unwrap();
    told
}

#[tokio::test]
async fn one_with_every_request_can_do_everything_that_the_host_lets_it() {
    let able = able(Fake::serve()).await;
    assert_eq!(able.hotplug[..4], ["block", "net", "fs", "pmem"]);
    assert_eq!(able.operations, ["pause", "snapshot", "resize-vcpus", "resize-memory", "resize-balloon"]);
    assert!(able.missing.keys().all(|key| key == "vfio-hotplug"), "{:?}", able.missing);
}

#[tokio::test]
async fn what_has_no_request_is_missing_by_the_requests_name() {
    let able = able(Fake::serve_without("vm.add-fs")).await;
    assert_eq!(able.hotplug[..3], ["block", "net", "pmem"]);
    assert_eq!(able.missing["fs-hotplug"], "Cloud Hypervisor 30.0 has no vm.add-fs");
}

#[tokio::test]
async fn an_operation_needs_all_of_its_requests() {
    let able = able(Fake::serve_without("vm.restore")).await;
    assert_eq!(able.missing["snapshot"], "Cloud Hypervisor 30.0 has no vm.restore");
}

#[tokio::test]
async fn the_devices_are_those_of_the_help() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cloud-hypervisor");
    let help = "#!/bin/sh\necho '  --disk <disk>...\n  --net <net>\n  --serial <serial>\n  --fs-like'\n";
    std::fs::write(&path, help).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut told = CapabilitiesResponse { version: "30.0".into(), ..Default::default() };
    devices(&path, &mut told).await.unwrap();
    assert_eq!(told.devices, ["block", "net", "console"]);
    assert_eq!(told.missing["fs"], "Cloud Hypervisor 30.0 has no --fs");
}
