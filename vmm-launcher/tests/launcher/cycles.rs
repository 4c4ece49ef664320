//! VMs one after the other, with every kind of device: what one leaves behind, a host has thousands of after a week.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::Path,
    time::Duration,
};

use caisson_protocol::vmm::{Balloon, Block, ExitReason, Fs, Rng, Vsock, device::Kind};
use nix::sys::signal::Signal;

use crate::{
    fixture::{Backend, Images, Launcher, children, device, for_backend, process_ended, text},
    network,
};

for_backend!(builtin_only, Builtin, a_hundred_vms_leave_nothing);

const VMS: usize = 100;
/// Where the kernel lists the VMs that there are, as `<process>-<descriptor>`, Documentation/virt/kvm/api.rst.
const LIVING: &str = "/sys/kernel/debug/kvm";

/// How far a VM gets.
#[derive(Clone, Copy, Debug)]
enum Life {
    Created,
    Booted,
    Up,
    PoweredOff,
}

async fn a_hundred_vms_leave_nothing(backend: Backend) {
    // An emulated guest takes seconds to be up: every fourth.
    const LIVES: [Life; 8] = {
        use Life::{Booted, Created, PoweredOff, Up};
        [Created, Booted, Booted, Up, Created, Booted, Booted, PoweredOff]
    };
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    let disk = images.dir.path().join("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let (descriptors, interfaces) = (descriptors(), interfaces());
    for life in LIVES.into_iter().cycle().take(VMS) {
        live(backend, &images, &disk, life).await;
    }
    assert_eq!(self::descriptors(), descriptors);
    assert_eq!(self::interfaces(), interfaces);
}

/// Each VM takes the same disk for writing, and the same tap: the one before has let go of them.
async fn live(backend: Backend, images: &Images, disk: &Path, life: Life) {
    let mut launcher = Launcher::start(backend).await;
    let socket = launcher.dir.path().join("vsock.sock");
    let mut request = launcher.request(images, if matches!(life, Life::PoweredOff) { "poweroff" } else { "sleep" });
    request.vm.as_mut().unwrap().devices = vec![
        launcher.logged_console(),
        device("disk", Kind::Block(Block { path: text(disk), ..Default::default() })),
        network::card_device(),
        device("vsock", Kind::Vsock(Vsock { socket: text(&socket), ..Default::default() })),
        device("fs", Kind::Fs(share(images))),
        device("rng", Kind::Rng(Rng { source: "/dev/urandom".into(), ..Default::default() })),
        device("balloon", Kind::Balloon(Balloon::default())),
    ];
    launcher.create(&request).await.unwrap();
    let number = launcher.child.id().unwrap();
    let children = children(number);
    assert_eq!(children.len(), 1, "virtiofsd");
    match life {
        Life::Created => {}
        Life::Booted => launcher.boot().await.unwrap(),
        Life::Up => {
            launcher.boot().await.unwrap();
            launcher.until_console_has("guest: up").await;
        }
        Life::PoweredOff => {
            launcher.boot().await.unwrap();
            assert_eq!(launcher.wait().await.reason, ExitReason::GUEST_SHUTDOWN.into());
        }
    }
    launcher.stop(Duration::ZERO).await;
    assert_eq!(launcher.leftovers(), [] as [std::path::PathBuf; 0], "{life:?}");
    assert!(!socket.exists(), "{life:?}");
    launcher.signal(Signal::SIGTERM);
    assert!(launcher.ended().await.success(), "{life:?}");
    for child in children {
        process_ended(child).await;
    }
    let prefix = format!("{number}-");
    let living = fs::read_dir(LIVING).into_iter().flatten().flatten();
    assert!(!living.into_iter().any(|vm| vm.file_name().to_string_lossy().starts_with(&prefix)), "{life:?}");
}

fn share(images: &Images) -> Fs {
    let shared_dir = text(images.dir.path());
    Fs { tag: "share".into(), shared_dir, daemon_path: text(&images.virtiofsd), ..Default::default() }
}

/// This process's.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn interfaces() -> BTreeSet<String> {
    nix::net::if_::if_nameindex().unwrap().iter().map(|interface| interface.name().to_string_lossy().into()).collect()
}
