//! The unsafe calls of this crate.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::{
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::getppid,
};
use rustix::fs::{Mode, OFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    process::Command,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Has the kernel kill the child when the thread that starts it ends.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = nix::unistd::getpid();
    let ask = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have ended before it could be asked for.
        if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    };
    // SAFETY: between fork and exec the closure only makes the system calls `prctl` and `getppid`, which are
    // async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(ask) };
}

/// Has the child write its line of `/proc/self/stat` to `list` before it executes its program.
pub(crate) fn join_list(command: &mut Command, list: OwnedFd) {
    let join = move || {
        let mut line = [0; 1024];
        let stat = rustix::fs::open(c"/proc/self/stat", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let count = rustix::io::read(&stat, &mut line)?;
        // One write, so that the lines of two processes stay apart.
        let written = rustix::io::write(&list, &line[..count])?;
        if written == count { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOSPC)) }
    };
    // SAFETY: between fork and exec the closure only makes the system calls `open`, `read`, `write` and `close`, which are
    // async-signal-safe, and allocates nothing: the path is a C string already.
    unsafe { command.pre_exec(join) };
}

/// `descriptor`, for a task that waits until it is readable.
pub(crate) fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the answer owns the descriptor, which stays open and the same until that has taken it out of the reactor.
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
    watched.map_err(|error| error.into_parts().1)
}

/// Gives the guest behind `vhost`, an open `/dev/vhost-vsock`, its context id; `EADDRINUSE` when another guest has it.
pub(crate) fn set_guest_cid(vhost: &File, cid: u64) -> io::Result<()> {
    nix::ioctl_write_ptr!(vhost_vsock_set_guest_cid, 0xaf, 0x60, u64);
    // SAFETY: the descriptor is open for the whole call, and the kernel only reads the eight bytes of `cid`
    // (VHOST_VSOCK_SET_GUEST_CID, linux/vhost.h).
    unsafe { vhost_vsock_set_guest_cid(vhost.as_raw_fd(), &cid) }?;
    Ok(())
}

/// Makes `tun`, an open `/dev/net/tun`, a queue of the interface `name`, with the flags `IFF_*`.
pub(crate) fn set_interface(tun: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    nix::ioctl_readwrite_bad!(tun_set_interface, libc::TUNSETIFF, libc::ifreq);
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // One byte stays zero.
    for (to, from) in ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short };
    let mut request = libc::ifreq { ifr_name, ifr_ifru };
    // SAFETY: the descriptor is open for the whole call, and the kernel reads and writes no more than the `ifreq` that
    // `request` is (TUNSETIFF, linux/if_tun.h).
    unsafe { tun_set_interface(tun.as_raw_fd(), &mut request) }?;
    Ok(())
}

/// Makes `memory` the guest's physical memory.
pub(crate) fn map_guest_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let mapping = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped, of this size, and the caller keeps `memory` for as long as `vm`'s vCPUs run;
        // nothing in this process holds a reference into it meanwhile.
        unsafe { vm.set_user_memory_region(mapping) }?;
    }
    Ok(())
}

/// The processor's time stamp counter.
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: every x86-64 processor has `rdtsc`, and Linux lets processes use it unless one asked it not to.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The version of the kernel's Landlock; 0 where it has none.
pub(crate) fn landlock_version() -> u32 {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    let (nothing, size) = (std::ptr::null::<libc::c_void>(), 0usize);
    // SAFETY: with this flag the kernel looks at no memory and only answers a number, landlock_create_ruleset(2).
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, size, LANDLOCK_CREATE_RULESET_VERSION) };
    u32::try_from(version).unwrap_or_default()
}
