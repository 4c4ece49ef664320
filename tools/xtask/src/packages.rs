//! The Debian packages that building and running take.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::step::{run, step};

/// Name, and what for.
const PACKAGES: &[(&str, &str)] = &[
    ("containerd", "runs the containers"),
    ("runc", "the runtime that caisson is compared with"),
    ("qemu-system-x86", "the hypervisor"),
    ("busybox-static", "the test image"),
    ("iproute2", "the tests' network interfaces"),
    ("mmdebstrap", "the web server image and guest images"),
    ("erofs-utils", "guest images"),
    ("e2fsprogs", "guest images"),
    ("cryptsetup-bin", "checks dm-verity of guest images"),
    ("make", "the guest's kernel"),
    ("flex", "the guest's kernel"),
    ("bison", "the guest's kernel"),
    ("bc", "the guest's kernel"),
    ("lz4", "the guest's kernel"),
    ("libelf-dev", "the guest's kernel"),
    ("libseccomp-dev", "the agent and virtiofsd"),
    ("libcap-ng-dev", "virtiofsd"),
    ("gcc", "links everything"),
    ("libc6-dev", "links everything"),
    ("pkg-config", "finds libraries"),
    ("xz-utils", "guest images"),
    ("util-linux", "the test host's namespaces"),
    ("ca-certificates", "crates.io"),
];

/// Installs those that are missing.
pub fn install() -> Result<()> {
    let missing: Vec<&str> = PACKAGES.iter().map(|(name, _)| *name).filter(|name| !is_installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for (name, purpose) in PACKAGES.iter().filter(|(name, _)| missing.contains(name)) {
        eprintln!("    {name}: {purpose}");
    }
    step("apt-get update", || run(apt_get().arg("update")))?;
    step(&format!("apt-get install {}", missing.join(" ")), || {
        run(apt_get().args(["install", "--yes", "--no-install-recommends"]).args(&missing))
    })
}

/// # Errors
/// On a machine that is not Debian, or without root.
pub fn check_machine() -> Result<()> {
    let release = std::fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    ensure!(
        release.lines().any(|line| line == "ID=debian"),
        "this machine is not Debian: the set-up takes its packages from Debian's apt and is tested on Debian 12"
    );
    let root = std::fs::metadata("/proc/self").map(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0);
    ensure!(root.unwrap_or(false), "run this as root: it installs packages and mounts file systems");
    Ok(())
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]).output();
    query.is_ok_and(|output| output.stdout == b"installed")
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet=2");
    command
}
