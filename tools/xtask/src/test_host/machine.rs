//! QEMU as the test host's hardware.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use caisson_test_host::{PORT, SCRATCH_DISK, SHARE, SPARE_DISK, SYSTEM_DISK};
use command_fds::{CommandFdExt, FdMapping};

use super::{child::ChildGuard, image::Image, share::Share};

/// An AMD processor with SVM, less what TCG cannot emulate of it.
const PROCESSOR: &str =
    "EPYC,+svm,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec";
const PLATFORM: &str = "q35,memory-backend=memory,smbus=off,sata=off,usb=off,vmport=off";
/// What lets it give devices away; it is Intel's, which Linux takes beside any processor. Guests' devices may have their
/// registers anywhere in 48 bits.
const IOMMU: &str = "intel-iommu,intremap=on,aw-bits=48";
/// A panic ends the machine. On a busy machine, the watchdog may distrust the emulated time stamp counter, and KVM then gives
/// guests a poorer clock.
const PARAMETERS: &str = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable intel_iommu=on iommu=pt";
/// QEMU's cache of translated code in MiB: the default grows with the machine's memory, not with what is executed.
const TRANSLATIONS_MIB: u32 = 256;

/// The descriptors that QEMU inherits.
const CONTROL_FD: i32 = 3;
const CONSOLE_FD: i32 = 4;
const SCRATCH_FD: i32 = 5;

/// Its clock and processors, and its size.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// What time is in it.
    pub clock: Clock,
    /// Memory in MiB. Taken from this machine only as it is used.
    pub memory_mib: u64,
}

/// What a machine's clock goes by.
#[derive(Clone, Copy, Debug)]
pub enum Clock {
    /// This machine's clock, with so many processors.
    Host {
        /// How many.
        cpus: u32,
    },
    /// One processor's instructions, a nanosecond each, while it has some to execute, and this machine's clock while it
    /// waits: how little of this machine it gets makes nothing in it late. For a `pause` instruction QEMU takes a thousand
    /// times as long as is counted: where one thread waits for another one in a loop of them, this clock all but stands still.
    Work,
    /// One processor's instructions alone: when it has none to execute, it is at once the time of the next timer. Durations
    /// repeat.
    Instructions,
}

impl Clock {
    fn arguments(self) -> Vec<String> {
        let (threads, cpus, icount) = match self {
            Self::Host { cpus } => ("multi", cpus, None),
            Self::Work => ("single", 1, Some("on")),
            Self::Instructions => ("single", 1, Some("off")),
        };
        let mut arguments = vec!["-accel".to_owned(), format!("tcg,thread={threads},tb-size={TRANSLATIONS_MIB}")];
        arguments.extend(["-smp".to_owned(), cpus.to_string()]);
        arguments.extend(icount.into_iter().flat_map(|idle| ["-icount".to_owned(), format!("shift=0,sleep={idle}")]));
        arguments
    }
}

/// This side's ends of what QEMU is connected to belong to others.
pub struct Connections {
    /// The port.
    pub control: UnixStream,
    /// The serial console.
    pub console: UnixStream,
    /// The disk that is written to.
    pub scratch: File,
}

impl Machine {
    /// Starts it.
    pub fn start(&self, image: &Image, share: &Share, connections: Connections) -> Result<ChildGuard> {
        let mut qemu = ChildGuard::command("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", PLATFORM]);
        qemu.args(["-cpu", PROCESSOR]).args(self.clock.arguments());
        // Before all devices, which are behind it.
        qemu.args(["-device", IOMMU]);
        qemu.arg("-m").arg(format!("{}M", self.memory_mib));
        qemu.arg("-object").arg(format!("memory-backend-memfd,id=memory,share=on,size={}M", self.memory_mib));
        qemu.arg("-kernel").arg(&image.kernel).arg("-initrd").arg(&image.initrd).args(["-append", PARAMETERS]);
        qemu.args(["-chardev", &format!("socket,id=console,fd={CONSOLE_FD}"), "-serial", "chardev:console"]);
        qemu.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        qemu.args(["-chardev", &format!("socket,id=control,fd={CONTROL_FD}")]);
        qemu.args(["-device", &format!("virtserialport,chardev=control,name={PORT}")]);

        let system = format!("read-only=on,file.filename={}", image.system.display());
        add_disk(&mut qemu, SYSTEM_DISK, &system, "");
        add_disk(&mut qemu, SPARE_DISK, &system, ",iommu_platform=on,disable-legacy=on");
        qemu.args(["-add-fd", &format!("fd={SCRATCH_FD},set=1")]);
        // Nobody reads it when the machine has ended.
        add_disk(&mut qemu, SCRATCH_DISK, "discard=unmap,cache.no-flush=on,file.filename=/dev/fdset/1", "");
        qemu.args(["-chardev", &format!("socket,id=share,path={},abstract=on", share.socket())]);
        qemu.args(["-device", &format!("vhost-user-fs-pci,chardev=share,tag={SHARE}")]);

        let inherit = |parent_fd: OwnedFd, child_fd| FdMapping { parent_fd, child_fd };
        let Connections { control, console, scratch } = connections;
        let descriptors = vec![
            inherit(control.into(), CONTROL_FD),
            inherit(console.into(), CONSOLE_FD),
            inherit(scratch.into(), SCRATCH_FD),
        ];
        qemu.fd_mappings(descriptors).context("pass QEMU its connections")?;
        // What it complains of is for the user.
        qemu.stdin(Stdio::null()).stdout(Stdio::null());
        ChildGuard::spawn(qemu)
    }
}

/// `file` and `device` are more options of QEMU's for each.
fn add_disk(qemu: &mut Command, serial: &str, file: &str, device: &str) {
    qemu.arg("-blockdev").arg(format!("driver=raw,node-name={serial},file.driver=file,{file}"));
    qemu.arg("-device").arg(format!("virtio-blk-pci,drive={serial},serial={serial}{device}"));
}
