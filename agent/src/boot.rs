//! What PID 1 does before it can call the host: file systems, modules, cgroups. Runs once, on one thread.

use std::{fs, fs::File, io::Write, panic, path::Path, sync::Mutex, time::Duration};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        statfs::{FsType, TMPFS_MAGIC, statfs},
    },
    time::{ClockId, clock_gettime},
    unistd::{chdir, chroot, sync},
};
use tracing::warn;
use tracing_subscriber::fmt::time::uptime;

use crate::{
    cgroup,
    cmdline::{End, Parameters},
    error::{Attempt, Result},
    modules,
};

/// Makes the machine usable, and says what the host asked of it.
///
/// # Errors
/// When a file system that nothing works without cannot be mounted.
pub fn prepare() -> Result<Parameters> {
    leave_initial_root()?;
    for file_system in &FILE_SYSTEMS {
        file_system.mount()?;
    }
    let parameters = Parameters::read();
    log_to_console(parameters);
    fs::create_dir_all(caisson_protocol::paths::GUEST_BUNDLE_DIR).attempt("make the directory of bundles")?;
    modules::load(Path::new(modules::ORDER));
    cgroup::prepare()?;
    Ok(parameters)
}

/// Time since the kernel started.
pub fn since_start() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// One line on the console, whether or not anything else works.
pub fn say(line: &str) {
    if let Ok(mut console) = File::options().write(true).open("/dev/console") {
        let _ = writeln!(console, "{line}");
    }
}

/// Ends the VM; does not return unless the kernel refuses.
pub fn end(how: End) {
    sync();
    let mode = match how {
        End::PowerOff => RebootMode::RB_POWER_OFF,
        End::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let Err(error) = reboot(mode);
    warn!(%error, "the VM cannot be ended");
}

struct FileSystem {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
    /// Whether a kernel without it will do.
    optional: bool,
}

const STRICT: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NO_DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

const FILE_SYSTEMS: [FileSystem; 9] = [
    FileSystem { kind: "proc", target: "/proc", flags: STRICT, data: "", optional: false },
    FileSystem { kind: "sysfs", target: "/sys", flags: STRICT, data: "", optional: false },
    FileSystem { kind: "devtmpfs", target: "/dev", flags: MsFlags::MS_NOSUID, data: "mode=0755", optional: false },
    FileSystem {
        kind: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,ptmxmode=0666,gid=5",
        optional: false,
    },
    FileSystem { kind: "tmpfs", target: "/dev/shm", flags: NO_DEVICES, data: "mode=1777", optional: false },
    FileSystem { kind: "mqueue", target: "/dev/mqueue", flags: STRICT, data: "", optional: true },
    FileSystem { kind: "tmpfs", target: "/run", flags: NO_DEVICES, data: "mode=0755", optional: false },
    FileSystem { kind: "tmpfs", target: "/tmp", flags: NO_DEVICES, data: "mode=1777", optional: false },
    FileSystem { kind: "cgroup2", target: cgroup::ROOT, flags: STRICT, data: "", optional: false },
];

impl FileSystem {
    fn mount(&self) -> Result<()> {
        // On a read-only root the directory has to be there; then mount(2) has the better message.
        let _ = fs::create_dir_all(self.target);
        match mount(Some(self.kind), self.target, Some(self.kind), self.flags, Some(self.data)) {
            // The kernel mounts /dev itself when it was built so.
            Ok(()) | Err(Errno::EBUSY) => Ok(()),
            Err(_) if self.optional => Ok(()),
            Err(error) => Err(error).attempt(format_args!("mount {} on {}", self.kind, self.target)),
        }
    }
}

/// `pivot_root(2)` refuses to work on the kernel's first root file system, which an initrd is unpacked into: containers
/// would have no way into their own root. A bind mount of the same files takes its place; nothing is copied.
fn leave_initial_root() -> Result<()> {
    const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
    const DOOR: &str = "/.root";
    let kind = statfs("/").attempt("look at the root file system")?.filesystem_type();
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Ok(());
    }
    fs::create_dir_all(DOOR).attempt("make /.root")?;
    let none = None::<&str>;
    mount(Some("/"), DOOR, none, MsFlags::MS_BIND, none).attempt("bind the initial root file system")?;
    chdir(DOOR).attempt("enter /.root")?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).attempt("move the root file system")?;
    chroot(".").attempt("enter the new root file system")?;
    chdir("/").attempt("enter the new root directory")
}

fn log_to_console(parameters: Parameters) {
    if let Ok(console) = File::options().write(true).open("/dev/console") {
        // One line at a time, straight to the device: nothing is kept, so nothing grows.
        tracing_subscriber::fmt()
            .with_max_level(parameters.log)
            .with_ansi(false)
            .with_target(false)
            .with_timer(uptime())
            .with_writer(Mutex::new(console))
            .init();
    }
    panic::set_hook(Box::new(move |info| {
        say(&format!("caisson-agent failed: {info}"));
        end(parameters.end);
    }));
}
