//! One queue of a tap interface: frames with a `virtio_net_hdr_v1` in front.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use caisson_protocol::vmm;
use caisson_vmm_launcher::{Error, Result, tap};
use libc::{IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, c_int, c_short, c_uint, ifreq};

use super::HEADER_SIZE;

/// An open queue; frames are read and written through its descriptor, which never blocks.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens the tap interface of `net`, a queue for each pair of the card's.
    ///
    /// # Errors
    /// With a sentence that says what to do.
    pub fn open_queues(net: &vmm::Net) -> Result<Vec<Self>> {
        let with_header = |queue| {
            let file = File::from(queue);
            ioctl::set_header_size(&file, HEADER_SIZE as c_int)
                .map_err(Error::host(format!("set the size of the headers of frames of {}", net.tap)))?;
            Ok(Self { file })
        };
        tap::open(net)?.into_iter().map(with_header).collect()
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
        match ioctl::set_queue(&self.file, &request(flags)) {
            // It is as it should be already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn request(flags: c_int) -> ifreq {
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as c_short };
    ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru }
}

/// The system calls of `linux/if_tun.h`.
mod ioctl {
    use libc::{TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ};

    use super::{AsRawFd, File, c_int, c_uint, ifreq, io};

    nix::ioctl_write_ptr_bad!(tun_set_queue, TUNSETQUEUE, ifreq);
    nix::ioctl_write_ptr_bad!(tun_set_header_size, TUNSETVNETHDRSZ, c_int);
    nix::ioctl_write_int_bad!(tun_set_offload, TUNSETOFFLOAD);

    pub fn set_queue(file: &File, request: &ifreq) -> io::Result<()> {
        // SAFETY: the descriptor is open for the whole call, and the kernel only reads the `ifreq` that `request` is.
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
