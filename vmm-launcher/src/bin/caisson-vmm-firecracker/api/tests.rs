//! What is sent, against a fake that refuses as Firecracker does.

use std::path::Path;

use caisson_protocol::vmm::{
    Balloon, Block, CapabilitiesResponse, Device, Net, Pmem, Rng, VmConfig, VmState, Vsock, device::Kind,
};

use super::{Api, SnapshotFiles, fake::Fake};
use crate::{configuration::Configuration, options::Options, probe::abilities};

fn files() -> SnapshotFiles {
    SnapshotFiles { state: "/snapshot/state".into(), memory: "/snapshot/memory".into() }
}

async fn api() -> Api {
    Api::over(Fake::serve()).await.unwrap()
}

/// One of each device.
fn vm() -> VmConfig {
    let device = |(id, kind): (&str, Kind)| Device { id: id.into(), kind: Some(kind), ..Default::default() };
    let devices = [
        ("root-1", Kind::Block(Block { path: "/etc/hostname".into(), read_only: true, ..Default::default() })),
        ("net-0", Kind::Net(Net { tap: "tap0".into(), mac: "02:00:00:00:00:01".into(), ..Default::default() })),
        ("vsock", Kind::Vsock(Vsock { socket: "/s".into(), ..Default::default() })),
        ("pmem-0", Kind::Pmem(Pmem { path: "/p".into(), ..Default::default() })),
        ("balloon", Kind::Balloon(Balloon { free_page_reporting: true, ..Default::default() })),
        ("rng", Kind::Rng(Rng { source: "/dev/urandom".into(), ..Default::default() })),
    ];
    VmConfig {
        vcpus: 1,
        memory_mib: 256,
        max_memory_mib: 300,
        image: "/image".into(),
        spare_disks: 10,
        devices: devices.map(device).to_vec(),
        ..Default::default()
    }
}

async fn configured(vm: &VmConfig) -> Api {
    let configuration = Configuration::of(vm, &Options::default(), Path::new("/run/vm")).unwrap();
    let api = api().await;
    api.configure(&configuration.calls).await.unwrap();
    api
}

#[tokio::test]
async fn a_vm_with_every_device_lives_through_everything() {
    let api = configured(&vm()).await;
    assert_eq!(api.state().await.unwrap(), VmState::CREATED);
    api.start().await.unwrap();
    api.flush_metrics().await.unwrap();
    api.request_memory(44).await.unwrap();
    assert_eq!(api.added_memory_mib().await.unwrap(), 44);
    api.resize_balloon(64).await.unwrap();
    assert_eq!(api.balloon_mib().await.unwrap(), 64);
    api.change_drive("spare_ro_0", "/disks/late").await.unwrap();
    assert_eq!(api.state().await.unwrap(), VmState::RUNNING);
    api.pause().await.unwrap();
    assert_eq!(api.state().await.unwrap(), VmState::PAUSED);
    api.create_snapshot(&files()).await.unwrap();
    api.resume().await.unwrap();
    api.press_ctrl_alt_del().await.unwrap();
}

#[tokio::test]
async fn whether_memory_is_of_huge_pages_is_told() {
    assert!(!configured(&vm()).await.has_huge_pages().await.unwrap());
    assert!(configured(&VmConfig { huge_pages: true, ..vm() }).await.has_huge_pages().await.unwrap());
}

#[tokio::test]
async fn a_snapshot_is_loaded_by_one_that_was_told_only_what_to_log() {
    let api = api().await;
    api.log_warnings_only().await.unwrap();
    api.load_snapshot(&files(), &[("net_0".into(), "tap1".into())]).await.unwrap();
    api.resume().await.unwrap();
}

#[tokio::test]
async fn a_snapshot_is_not_loaded_by_one_that_was_told_of_a_vm() {
    let refusal = configured(&vm()).await.load_snapshot(&files(), &[]).await.unwrap_err().to_string();
    assert!(refusal.starts_with("Firecracker's PUT /snapshot/load: Load snapshot error: "), "{refusal}");
}

#[tokio::test]
async fn a_snapshot_of_a_running_guest_is_refused() {
    let api = configured(&vm()).await;
    api.start().await.unwrap();
    assert!(api.create_snapshot(&files()).await.is_err());
}

#[tokio::test]
async fn a_guest_is_not_started_without_a_kernel_nor_twice() {
    let refusal = api().await.start().await.unwrap_err().to_string();
    assert_eq!(refusal, "Firecracker's PUT /actions: Cannot start microvm without kernel configuration");
    let api = configured(&vm()).await;
    api.start().await.unwrap();
    assert!(api.start().await.is_err());
}

#[tokio::test]
async fn a_disk_is_not_changed_before_the_guest_starts() {
    let refusal = configured(&vm()).await.change_drive("spare_ro_0", "/disks/late").await.unwrap_err().to_string();
    assert!(refusal.ends_with("not supported before starting the microVM"), "{refusal}");
}

#[tokio::test]
async fn a_disk_that_is_none_cannot_be_changed() {
    let api = configured(&vm()).await;
    api.start().await.unwrap();
    assert!(api.change_drive("spare_ro_99", "/disks/late").await.is_err());
}

#[tokio::test]
async fn a_started_guest_takes_no_devices() {
    let api = configured(&vm()).await;
    api.start().await.unwrap();
    let entropy = ("/entropy".to_owned(), serde_json::json!({}));
    let refusal = api.configure(&[entropy]).await.unwrap_err().to_string();
    assert!(refusal.ends_with("not supported after starting the microVM"), "{refusal}");
}

async fn able(stream: tokio::net::UnixStream) -> CapabilitiesResponse {
    abilities(&Api::over(stream).await.unwrap(), "1.12.0").await.unwrap()
}

#[tokio::test]
async fn a_firecracker_with_every_endpoint_can_do_everything() {
    let able = able(Fake::serve()).await;
    assert_eq!(able.devices, ["block", "net", "vsock", "pmem", "balloon", "rng", "console"]);
    assert_eq!(able.hotplug, ["block"]);
    assert_eq!(able.operations, ["pause", "snapshot", "resize-balloon", "resize-memory"]);
    assert!(able.missing.is_empty(), "{:?}", able.missing);
}

#[tokio::test]
async fn what_has_no_endpoint_is_missing_by_the_endpoints_name() {
    let able = able(Fake::serve_without("/pmem")).await;
    assert_eq!(able.devices, ["block", "net", "vsock", "balloon", "rng", "console"]);
    assert_eq!(able.missing["pmem"], "Firecracker 1.12.0 has no PUT /pmem/{id}");
}

#[tokio::test]
async fn an_operation_needs_all_of_its_endpoints() {
    let able = able(Fake::serve_without("/snapshot/load")).await;
    assert_eq!(able.operations, ["pause", "resize-balloon", "resize-memory"]);
    assert_eq!(able.missing["snapshot"], "Firecracker 1.12.0 has no PUT /snapshot/load");
}

#[tokio::test]
async fn nothing_comes_of_the_questions() {
    let stream = Fake::serve();
    let api = Api::over(stream).await.unwrap();
    abilities(&api, "1.12.0").await.unwrap();
    // Refused by one that was told of a VM.
    api.load_snapshot(&files(), &[]).await.unwrap();
}

#[tokio::test]
async fn an_answer_that_says_neither_is_told() {
    let (near, far) = tokio::net::UnixStream::pair().unwrap();
    drop(far);
    let error = abilities(&Api::over(near).await.unwrap(), "1.12.0").await.unwrap_err().to_string();
    assert_eq!(error, "Firecracker's PUT /drives/drive_id: Firecracker hung up");
}

#[tokio::test]
async fn the_fake_refuses_what_firecracker_refuses() {
    let api = api().await;
    for (path, body) in [
        ("/vsock", serde_json::json!({ "guest_cid": 3, "uds_path": "/s", "cid": 3 })),
        ("/drives/a-b", serde_json::json!({ "drive_id": "a-b" })),
        ("/virtio-fs", serde_json::json!({})),
        ("/hotplug/memory", serde_json::json!({ "total_size_mib": 100, "slot_size_mib": 128 })),
    ] {
        assert!(api.configure(&[(path.to_owned(), body)]).await.is_err(), "{path}");
    }
}
