//! What is built boots: a guest loads the modules in their order and then has what we promise.

use std::path::{Path, PathBuf};
use std::process::Command;

use image_builder::cache::Cache;
use image_builder::progress::Progress;
use image_builder::{Request, Target, build};

/// How long a guest may take to boot and power off, emulated on a busy machine, in seconds.
const DEADLINE: &str = "120";

fn console_of(kernel: &Path, initrd: &Path) -> String {
    let mut qemu = Command::new("timeout");
    qemu.args([DEADLINE, "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256"]);
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    qemu.args(["-append", "console=ttyS0 quiet panic=-1", "-kernel"]).arg(kernel).arg("-initrd").arg(initrd);
    let output = qemu.stdin(std::process::Stdio::null()).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The machine's cache, so that the kernel is fetched once; its own where that is not allowed.
fn cache(directory: &Path) -> PathBuf {
    let shared = Cache::default_root();
    if Cache::open(&shared).is_ok() { shared } else { directory.join("cache") }
}

#[test]
fn a_guest_loads_every_module_and_has_our_filesystems_and_drivers() {
    if !(crate::common::has("qemu-system-x86_64") && crate::common::has_kernel_package()) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("output");
    let mut request = Request {
        target: Target::Kernel,
        recipe: crate::common::recipe(),
        output: output.clone(),
        cache: cache(directory.path()),
        agent: Some(crate::common::static_init(directory.path())),
    };
    build(&request, &Progress::silent()).unwrap();
    request.target = Target::Initrd;
    build(&request, &Progress::silent()).unwrap();

    let console = console_of(&output.join("vmlinux"), &output.join("initrd.img"));

    assert!(console.contains("guest: done"), "{console}");
    assert!(!console.contains("cannot load") && !console.contains("missing /lib"), "{console}");
    let expected = ["filesystem virtiofs", "filesystem overlay", "filesystem erofs", "filesystem ext4", "vsock true"];
    let drivers = ["driver virtio_blk", "driver virtio_net", "driver virtio_rng", "driver virtio_balloon"];
    let missing: Vec<_> = expected.iter().chain(&drivers).filter(|line| !console.contains(**line)).collect();
    assert!(missing.is_empty(), "the guest has no {missing:?}: {console}");
}
