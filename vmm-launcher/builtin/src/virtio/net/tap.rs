//! One queue of a tap interface: frames with a `virtio_net_hdr_v1` in front.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    os::unix::fs::OpenOptionsExt,
};

use caisson_vmm_launcher::{Error, Result};
use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFNAMSIZ, c_char, c_int,
    c_short, c_uint, ifreq,
};
use nix::net::if_::if_nametoindex;

use super::HEADER_SIZE;

const DEVICE: &str = "/dev/net/tun";

/// An open queue; frames are read and written through its descriptor, which never blocks.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens `queues` queues of the tap interface `name`, which must exist in this thread's network namespace.
    ///
    /// # Errors
    /// With a sentence that says what to do.
    pub fn open_queues(name: &str, queues: usize) -> Result<Vec<Self>> {
        // The kernel would make the interface.
        if if_nametoindex(name).is_err() {
            return Err(Error::Invalid(format!("there is no network interface {name}")));
        }
        (0..queues).map(|_| Self::open(name, queues > 1)).collect()
    }

    fn open(name: &str, many: bool) -> Result<Self> {
        let attached = Self::attach(name, if many { IFF_MULTI_QUEUE } else { 0 });
        let attached = match attached {
            // An interface with several queues says so of every one.
            Err(error) if !many && has_code(&error, libc::EINVAL) => Self::attach(name, IFF_MULTI_QUEUE),
            attached => attached,
        };
        attached.map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => unusable(name, "another program uses it: end that, or use another interface"),
            Some(libc::EPERM) => {
                unusable(name, "it belongs to another user: run as its owner or with the capability CAP_NET_ADMIN")
            }
            Some(libc::E2BIG) => unusable(name, "it has no more queues: use fewer queue_pairs"),
            Some(libc::EINVAL) if many => unusable(
                name,
                "it is not a tap interface with several queues: make it with `ip tuntap add mode tap multi_queue`",
            ),
            Some(libc::EINVAL) => {
                unusable(name, "it is not a tap interface: make one with `ip tuntap add mode tap vnet_hdr`")
            }
            Some(libc::ENOENT) => unusable(name, "this machine has no /dev/net/tun: load the kernel module tun"),
            Some(libc::EACCES) => unusable(name, "/dev/net/tun may not be opened: let this user read and write it"),
            _ => Error::host(format!("open the tap interface {name} through {DEVICE}"))(error),
        })
    }

    fn attach(name: &str, flags: c_int) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
        ioctl::set_interface(&file, &request(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags))?;
        ioctl::set_header_size(&file, HEADER_SIZE as c_int)?;
        Ok(Self { file })
    }

    /// Says which kinds of unfinished frames may be received, as `TUN_F_*` of `linux/if_tun.h`; counts for all queues.
    ///
    /// # Errors
    /// When the kernel does not know one of them.
    pub fn set_offloads(&self, offloads: c_uint) -> io::Result<()> {
        ioctl::set_offloads(&self.file, offloads)
    }

    /// Lets frames come to this queue or not. Only where there are several.
    ///
    /// # Errors
    /// When the interface is gone.
    pub fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        let flags = if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        match ioctl::set_queue(&self.file, &request("", flags)) {
            // It is as it should be already.
            Err(error) if has_code(&error, libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn unusable(name: &str, why: &str) -> Error {
    Error::Invalid(format!("the tap interface {name} cannot be used: {why}"))
}

fn has_code(error: &io::Error, code: c_int) -> bool {
    error.raw_os_error() == Some(code)
}

fn request(name: &str, flags: c_int) -> ifreq {
    // SAFETY: a structure of numbers and of unions of numbers and pointers, for which zero is a value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero.
    for (to, from) in request.ifr_name[..IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as c_char;
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    request
}

/// The system calls of `linux/if_tun.h`.
mod ioctl {
    use libc::{TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ};

    use super::{AsRawFd, File, c_int, c_uint, ifreq, io};

    nix::ioctl_write_ptr_bad!(tun_set_interface, TUNSETIFF, ifreq);
    nix::ioctl_write_ptr_bad!(tun_set_queue, TUNSETQUEUE, ifreq);
    nix::ioctl_write_ptr_bad!(tun_set_header_size, TUNSETVNETHDRSZ, c_int);
    nix::ioctl_write_int_bad!(tun_set_offload, TUNSETOFFLOAD);

    pub fn set_interface(file: &File, request: &ifreq) -> io::Result<()> {
        // SAFETY: the descriptor is open for the whole call, and the kernel only reads the `ifreq` that `request` is.
        unsafe { tun_set_interface(file.as_raw_fd(), request) }?;
        Ok(())
    }

    pub fn set_queue(file: &File, request: &ifreq) -> io::Result<()> {
        // SAFETY: as for `set_interface`.
        unsafe { tun_set_queue(file.as_raw_fd(), request) }?;
        Ok(())
    }

    pub fn set_header_size(file: &File, bytes: c_int) -> io::Result<()> {
        // SAFETY: the descriptor is open for the whole call, and the kernel only reads the number.
        unsafe { tun_set_header_size(file.as_raw_fd(), &bytes) }?;
        Ok(())
    }

    pub fn set_offloads(file: &File, offloads: c_uint) -> io::Result<()> {
        // SAFETY: the descriptor is open for the whole call; the argument is no pointer.
        unsafe { tun_set_offload(file.as_raw_fd(), offloads as c_int) }?;
        Ok(())
    }
}
