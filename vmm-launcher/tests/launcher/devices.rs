//! What a guest finds in its VM.

use std::fs;

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{
        self, AttachRequest, Balloon, Block, Console, CreateRequest, DetachRequest, ExitReason, Fs, Net, Rng, Vsock,
        device::Kind,
    },
};

use crate::fixture::{Images, LIMIT, Launcher, device, text};

fn disk(images: &Images, name: &str, read_only: bool) -> Kind {
    let path = images.dir.path().join(name);
    fs::write(&path, [0; 4096]).unwrap();
    Kind::Block(Block { path: text(&path), read_only, ..Default::default() })
}

/// One of each.
fn with_devices(launcher: &Launcher, images: &Images, machine_type: &str) -> CreateRequest {
    let shared = images.dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("hello"), "hello").unwrap();
    let mut request = launcher.request(images, "list");
    request.options = format!("machine_type = \"{machine_type}\"\naccel = \"tcg\"");
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

async fn finds_its_devices(machine_type: &str) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start().await;
    let request = with_devices(&launcher, &images, machine_type);
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

#[tokio::test]
async fn a_guest_on_microvm_finds_its_devices() {
    finds_its_devices("microvm").await;
}

#[tokio::test]
async fn a_guest_on_q35_finds_its_devices() {
    finds_its_devices("q35").await;
}

#[tokio::test]
async fn a_disk_comes_and_goes_while_q35_runs() {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start().await;
    let mut request = launcher.request(&images, "watch");
    request.options = "machine_type = \"q35\"\naccel = \"tcg\"".into();
    let log = launcher.dir.path().join("console.log");
    request.vm.as_mut().unwrap().devices =
        vec![device("console", Kind::Console(Console { log: text(&log), ..Default::default() }))];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has(&log, "guest: disks ").await;

    let attach =
        AttachRequest { device: Some(device("late", disk(&images, "late", true))).into(), ..Default::default() };
    let attached = launcher.client.attach(deadline(LIMIT), &attach).await.unwrap();
    assert_eq!(attached.device.address, "serial:late");
    launcher.until_console_has(&log, "guest: disks late").await;

    let detach = DetachRequest { id: "late".into(), ..Default::default() };
    launcher.client.detach(deadline(LIMIT), &detach).await.unwrap();
    launcher.until_console_has(&log, "guest: disks late\r\nguest: disks ").await;
    let twice = Status::from(launcher.client.detach(deadline(LIMIT), &detach).await.unwrap_err());
    assert_eq!(twice.code, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn a_disk_cannot_come_while_microvm_runs() {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start().await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    let attach =
        AttachRequest { device: Some(device("late", disk(&images, "late", true))).into(), ..Default::default() };
    let status = Status::from(launcher.client.attach(deadline(LIMIT), &attach).await.unwrap_err());
    assert_eq!(status.code, Code::UNIMPLEMENTED);
    assert!(status.message.contains("q35"), "{status}");
}

#[tokio::test]
async fn a_guest_finds_the_card_on_its_tap() {
    let Some(images) = Images::find() else { return };
    // This thread's own network, which the launcher inherits.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let made = std::process::Command::new("ip").args(["tuntap", "add", "tap0", "mode", "tap"]).status().unwrap();
    assert!(made.success());
    let launcher = Launcher::start().await;
    let mut request = launcher.request(&images, "list");
    let net = Net { tap: "tap0".into(), mac: "02:00:00:00:12:34".into(), ..Default::default() };
    request.vm.as_mut().unwrap().devices = vec![device("net", Kind::Net(net))];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    let exit = launcher.wait().await;
    assert!(exit.console_tail.contains("guest: card 02:00:00:00:12:34"), "{exit}");
}

#[tokio::test]
async fn what_is_known_of_a_vm_is_counted() {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start().await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    let metrics = launcher.client.metrics(deadline(LIMIT), &vmm::MetricsRequest::new()).await.unwrap().text;
    assert!(metrics.contains("\ncaisson_vm_console_bytes_total 0\n"), "{metrics}");
    assert!(metrics.contains("\ncaisson_vm_memory_bytes 201326592\n"), "{metrics}");
}
