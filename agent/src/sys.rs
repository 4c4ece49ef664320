//! The system calls that no library offers in safe form.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::signal::{SigHandler, Signal, signal},
    unistd::Pid,
};
use tokio::io::{Interest, unix::AsyncFd};

mod ioctls {
    // `linux/random.h`: RNDADDTOENTCNT, RNDRESEEDCRNG.
    nix::ioctl_write_ptr!(add_to_entropy_count, b'R', 0x01, nix::libc::c_int);
    nix::ioctl_none!(reseed, b'R', 0x07);
    // `linux/vm_sockets.h`: IOCTL_VM_SOCKETS_GET_LOCAL_CID.
    nix::ioctl_read_bad!(local_cid, nix::request_code_none!(7, 0xb9), u32);
}

/// Has the runtime tell when `fd` is ready for `interest`.
///
/// # Errors
/// When it is nothing that can be waited for.
pub fn register(fd: impl Into<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always answers the same descriptor and keeps it open until it is dropped, and `AsyncFd` owns
    // it from here on.
    unsafe { AsyncFd::register_with_interest(fd.into(), interest) }.map_err(|refused| refused.into_parts().1)
}

/// Takes a descriptor that the parent process passed by number.
///
/// # Errors
/// When no such descriptor is open.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer and changes nothing.
    if fd < 3 || unsafe { nix::libc::fcntl(fd, nix::libc::F_GETFD) } < 0 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: `fd` is open, above the standard streams, and was opened by the parent for this process alone; the one
    // caller takes each number once, before it opens anything itself.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has the allocator give large buffers back to the kernel when they are freed, always: left alone, glibc keeps the
/// memory of the largest request that it has seen.
pub fn return_large_buffers() {
    const LARGE: nix::libc::c_int = 64 * 1024;
    // SAFETY: the call changes two numbers of the allocator, which no other thread uses yet.
    unsafe { nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, LARGE) };
    // SAFETY: as above.
    unsafe { nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, LARGE) };
}

/// Gives SIGPIPE back the meaning that programs expect: Rust's runtime ignores it, and `execve(2)` keeps that.
pub fn restore_sigpipe() -> io::Result<()> {
    // SAFETY: SIG_DFL runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    Ok(())
}

/// Credits what was written to `random` as entropy, and has the kernel use it at once.
pub fn credit_entropy(random: &File, bits: i32) -> io::Result<()> {
    // SAFETY: `random` is open for the call, and the kernel reads one c_int.
    unsafe { ioctls::add_to_entropy_count(random.as_raw_fd(), &bits) }?;
    // SAFETY: the request has no argument.
    unsafe { ioctls::reseed(random.as_raw_fd()) }?;
    Ok(())
}

/// Sends any signal, also a real-time one: libraries know only those with a name.
pub fn kill(pid: Pid, signal: i32) -> nix::Result<()> {
    // SAFETY: the call takes two numbers.
    Errno::result(unsafe { nix::libc::kill(pid.as_raw(), signal) }).map(drop)
}

/// `bpf(2)`: `BPF_PROG_LOAD` for `BPF_PROG_TYPE_CGROUP_DEVICE`.
pub fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
    }
    const BPF_PROG_LOAD: nix::libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    // SAFETY: the kernel reads `load` and the two arrays that it points to, all of which outlive the call; it takes a
    // request that is shorter than its own structure.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just opened the descriptor, for this process alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// `bpf(2)`: `BPF_PROG_ATTACH` as `BPF_CGROUP_DEVICE`. The program lives as long as the cgroup.
pub fn attach_device_program(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
    #[repr(C)]
    struct Attach {
        target: RawFd,
        program: RawFd,
        kind: u32,
        flags: u32,
    }
    const BPF_PROG_ATTACH: nix::libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attach = Attach {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the kernel reads `attach`, and both descriptors are open for the call.
    let done =
        unsafe { nix::libc::syscall(nix::libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The guest's own context id, from `/dev/vsock`.
pub fn local_cid() -> io::Result<u32> {
    let vsock = File::open("/dev/vsock")?;
    let mut cid = 0;
    // SAFETY: `vsock` is open for the call, and the kernel writes one u32.
    unsafe { ioctls::local_cid(vsock.as_raw_fd(), &mut cid) }?;
    Ok(cid)
}
