//! From an initrd to a Debian system: Debian's files are read-only on one disk, everything written goes to another.

use std::{
    env,
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_test_host::{SCRATCH_DISK, SHARE, SYSTEM_DISK};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    unistd::{chroot, sethostname},
};

/// One absolute path a line, in the order to load them; image-builder writes it.
const MODULE_ORDER: &str = "/lib/modules/order";
/// How many huge pages may be made when they are asked for.
const HUGE_PAGES: &str = "/proc/sys/vm/nr_overcommit_hugepages";
const MOST_HUGE_PAGES: &str = "1024";
/// How long KVM waits for a guest to go on before it lets others have the processor. That is a loop of `pause` instructions,
/// for which QEMU takes a thousand times as long as its clock of instructions thinks.
const HALT_POLL_NS: &str = "/sys/module/kvm/parameters/halt_poll_ns";
const CGROUPS: &str = "/sys/fs/cgroup";
/// Where the parts of the root are mounted in the initrd.
const SYSTEM: &str = "/system";
const SCRATCH: &str = "/scratch";
const MACHINE: &str = "/machine";
const ROOT: &str = "/root";

/// What everything else needs.
pub fn mount_kernel_filesystems() -> Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount_new(kind, kind, target, MsFlags::empty(), "")?;
    }
    Ok(())
}

/// Loads the initrd's modules.
pub fn load_modules() -> Result<()> {
    let order = fs::read_to_string(MODULE_ORDER).with_context(|| format!("read {MODULE_ORDER}"))?;
    for path in order.lines() {
        let file = File::open(path).with_context(|| format!("open {path}"))?;
        finit_module(file, c"", ModuleInitFlags::empty()).with_context(|| format!("load {path}"))?;
    }
    Ok(())
}

/// Puts the root together from its disks and the machine's `shared` folders, and makes it this process's.
pub fn enter_root(shared: &[PathBuf]) -> Result<()> {
    mount_new("erofs", &disk(SYSTEM_DISK)?, SYSTEM, MsFlags::MS_RDONLY, "")?;
    mount_new("ext4", &disk(SCRATCH_DISK)?, SCRATCH, MsFlags::empty(), "")?;
    mount_writable(SYSTEM, "root", ROOT)?;
    // containerd's snapshots are overlays themselves, which do not stack on the root's.
    for folder in ["/tmp", "/var/tmp", "/var/lib/containerd"] {
        let scratch = format!("{SCRATCH}/plain{folder}");
        make_folder(&scratch)?;
        fs::set_permissions(&scratch, Permissions::from_mode(0o1777)).with_context(|| format!("open up {scratch}"))?;
        mount_new("", &scratch, &format!("{ROOT}{folder}"), MsFlags::MS_BIND, "")?;
    }
    if !shared.is_empty() {
        mount_new("virtiofs", SHARE, MACHINE, MsFlags::MS_RDONLY, "")?;
    }
    for (number, folder) in shared.iter().enumerate() {
        let folder = folder.display();
        mount_writable(&format!("{MACHINE}{folder}"), &format!("shared-{number}"), &format!("{ROOT}{folder}"))?;
    }
    for folder in ["/dev", "/proc", "/sys"] {
        mount_new("", folder, &format!("{ROOT}{folder}"), MsFlags::MS_MOVE, "")?;
    }
    env::set_current_dir(ROOT).context("enter the root")?;
    mount_new("", ".", "/", MsFlags::MS_MOVE, "")?;
    chroot(".").context("enter the root")?;
    env::set_current_dir("/").context("enter the root")
}

/// What an init system would have done before a user comes.
pub fn prepare() -> Result<()> {
    mount_new("tmpfs", "tmpfs", "/run", MsFlags::empty(), "mode=755")?;
    mount_new("tmpfs", "tmpfs", "/dev/shm", MsFlags::empty(), "mode=1777")?;
    mount_new("devpts", "devpts", "/dev/pts", MsFlags::empty(), "mode=620,ptmxmode=666")?;
    mount_new("debugfs", "debugfs", "/sys/kernel/debug", MsFlags::empty(), "")?;
    mount_new("tracefs", "tracefs", "/sys/kernel/tracing", MsFlags::empty(), "")?;
    mount_new("cgroup2", "cgroup2", CGROUPS, MsFlags::empty(), "")?;
    let controllers = fs::read_to_string(format!("{CGROUPS}/cgroup.controllers")).context("read the controllers")?;
    for controller in controllers.split_whitespace() {
        let control = format!("{CGROUPS}/cgroup.subtree_control");
        fs::write(&control, format!("+{controller}")).with_context(|| format!("enable {controller} in {control}"))?;
    }
    fs::write(HUGE_PAGES, MOST_HUGE_PAGES).with_context(|| format!("write {HUGE_PAGES}"))?;
    fs::write(HALT_POLL_NS, "0").with_context(|| format!("write {HALT_POLL_NS}"))?;
    sethostname("test-host").context("set the host's name")?;
    // containerd gives pods on the host's network its own.
    for (file, text) in [("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"), ("/etc/resolv.conf", "")] {
        fs::write(file, text).with_context(|| format!("write {file}"))?;
    }
    let loopback = Command::new("/usr/sbin/ip").args(["link", "set", "lo", "up"]).status();
    ensure!(loopback.context("execute ip")?.success(), "the loopback device cannot be set up");
    Ok(())
}

/// The device of the disk with that serial number.
fn disk(serial: &str) -> Result<String> {
    for entry in fs::read_dir("/sys/block").context("read /sys/block")? {
        let entry = entry.context("read /sys/block")?;
        if fs::read_to_string(entry.path().join("serial")).is_ok_and(|found| found.trim_end() == serial) {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    anyhow::bail!("no disk has the serial number {serial}")
}

/// Shows `lower` at `target`, with everything written to it going to the scratch disk.
fn mount_writable(lower: &str, name: &str, target: &str) -> Result<()> {
    let (upper, work) = (format!("{SCRATCH}/{name}/upper"), format!("{SCRATCH}/{name}/work"));
    make_folder(&upper)?;
    make_folder(&work)?;
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    mount_new("overlay", "overlay", target, MsFlags::empty(), &options)
}

/// Mounts, making the target where there is none.
fn mount_new(kind: &str, source: &str, target: &str, flags: MsFlags, options: &str) -> Result<()> {
    make_folder(target)?;
    let mounted = mount(Some(source), target, Some(kind), flags, Some(options));
    mounted.with_context(|| format!("mount {source} at {target}"))
}

fn make_folder(path: &str) -> Result<()> {
    match fs::create_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !Path::new(path).exists() => {
            Err(error).with_context(|| format!("make {path}"))
        }
        _ => Ok(()),
    }
}
