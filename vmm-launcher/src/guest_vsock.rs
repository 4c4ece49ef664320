//! Which vsock a guest gets from a hypervisor that has no hybrid vsock of its own: the kernel's, or ours over vhost-user.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
    path::Path,
};

use caisson_protocol::address::HYBRID_CID;
use tracing::info;

use crate::{Error, Result, sys, virtiofsd::connected_listener, vsock::VsockBackend};

const VHOST_VSOCK: &str = "/dev/vhost-vsock";

/// A guest's vsock device, as its hypervisor is told of it.
pub enum GuestVsock {
    /// The kernel's; the descriptor has the CID already.
    Kernel {
        /// `/dev/vhost-vsock`, for the hypervisor.
        vhost: OwnedFd,
        /// Unique on the host.
        cid: u32,
    },
    /// Ours, in this process.
    Hybrid {
        /// Stopped when dropped.
        backend: VsockBackend,
        /// The hypervisor's connection to it.
        connection: OwnedFd,
    },
}

impl GuestVsock {
    /// The kernel's where there is one, else hybrid vsock at `socket`.
    ///
    /// # Errors
    /// When neither can be set up.
    pub fn open(socket: &Path, run_dir: &Path) -> Result<Self> {
        match OpenOptions::new().read(true).write(true).open(VHOST_VSOCK) {
            Ok(vhost) => {
                let cid = choose_cid(&vhost).map_err(Error::host(format!("choose a guest's CID on {VHOST_VSOCK}")))?;
                Ok(Self::Kernel { vhost: vhost.into(), cid })
            }
            Err(error) => {
                info!(%error, "{VHOST_VSOCK} cannot be used, the guest gets hybrid vsock");
                let (listener, connection) = connected_listener(&run_dir.join("vhost-vsock.sock"))?;
                let backend = VsockBackend::start(listener, socket, HYBRID_CID.into())?;
                Ok(Self::Hybrid { backend, connection })
            }
        }
    }
}

/// Tries the CIDs above the reserved ones, beginning at one that differs from process to process.
fn choose_cid(vhost: &File) -> io::Result<u32> {
    let first = HYBRID_CID + std::process::id() % (1 << 22);
    for cid in first..first + (1 << 12) {
        match sys::set_guest_cid(vhost, cid.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {}
            Err(error) => return Err(error),
            Ok(()) => return Ok(cid),
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}
