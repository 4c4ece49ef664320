//! Which vsock a guest gets from a hypervisor that has no hybrid vsock of its own: the kernel's, or ours over vhost-user.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_protocol::address::HYBRID_CID;
use tokio::time::timeout;
use tracing::info;

use crate::{
    Error, Result,
    outlive::{Known, Lifetime},
    process::{Process, Streams},
    sys,
    virtiofsd::connected_listener,
    vsock::VsockBackend,
};

const VHOST_VSOCK: &str = "/dev/vhost-vsock";
/// How much later than the hypervisor the server of its vsock may end.
const HANG_UP: Duration = Duration::from_secs(1);

/// A guest's vsock device, as its hypervisor is told of it.
pub enum GuestVsock {
    /// The kernel's; the descriptor has the CID already.
    Kernel {
        /// `/dev/vhost-vsock`, for the hypervisor.
        vhost: OwnedFd,
        /// Unique on the host.
        cid: u32,
    },
    /// Ours.
    Hybrid {
        /// Stopped when dropped.
        server: VsockServer,
        /// The hypervisor's connection to it.
        connection: OwnedFd,
    },
}

impl GuestVsock {
    /// The kernel's where there is one, else hybrid vsock at `socket`.
    ///
    /// # Errors
    /// When neither can be set up.
    pub fn open(socket: &Path, run_dir: &Path, lifetime: &Lifetime) -> Result<Self> {
        match OpenOptions::new().read(true).write(true).open(VHOST_VSOCK) {
            Ok(vhost) => {
                let cid = choose_cid(&vhost).map_err(Error::host(format!("choose a guest's CID on {VHOST_VSOCK}")))?;
                Ok(Self::Kernel { vhost: vhost.into(), cid })
            }
            Err(error) => {
                info!(%error, "{VHOST_VSOCK} cannot be used, the guest gets hybrid vsock");
                let (listener, connection) = connected_listener(&run_dir.join("vhost-vsock.sock"))?;
                let server = if lifetime.is_longer() {
                    VsockServer::start(listener, socket, lifetime)?
                } else {
                    VsockServer::Here(VsockBackend::start(listener, socket, HYBRID_CID.into())?)
                };
                Ok(Self::Hybrid { server, connection })
            }
        }
    }
}

/// Who serves a guest's hybrid vsock.
#[derive(Debug)]
pub enum VsockServer {
    /// This process.
    Here(VsockBackend),
    /// A process of its own, which outlives the launcher as the hypervisor does.
    Aside {
        /// This program again.
        process: Process,
        /// Where host programs connect.
        socket: PathBuf,
    },
}

impl VsockServer {
    fn start(listener: UnixListener, socket: &Path, lifetime: &Lifetime) -> Result<Self> {
        let arguments = [SERVE_VSOCK.to_owned(), socket.to_string_lossy().into_owned()];
        let streams = Streams { stdin: OwnedFd::from(listener).into(), ..Streams::none() };
        let process = Process::start_with(Path::new("/proc/self/exe"), &arguments, Vec::new(), streams, lifetime)?;
        Ok(Self::Aside { process, socket: socket.to_owned() })
    }

    /// The one of a launcher that was killed.
    ///
    /// # Errors
    /// When it has ended.
    pub fn adopt(socket: &Path, known: &Known) -> Result<Self> {
        Ok(Self::Aside { process: Process::adopt(known)?, socket: socket.to_owned() })
    }

    /// Its socket, and what another launcher needs to adopt it; none when it ends with this one.
    pub fn known(&self) -> Option<(PathBuf, Known)> {
        match self {
            Self::Here(_) => None,
            Self::Aside { process, socket } => Some((socket.clone(), process.known())),
        }
    }

    /// Answers when it has failed, with its last words. It also ends when the hypervisor hangs up; that is never answered.
    pub async fn failed(&self) -> String {
        if let Self::Aside { process, .. } = self {
            let ended = process.ended().await;
            if !ended.well() {
                return format!("the server of the guest's vsock ended: {}", process.describe(&ended));
            }
        }
        std::future::pending().await
    }

    /// Ends it and waits until it has.
    pub async fn end(self) {
        if let Self::Aside { process, socket } = self {
            // By itself when the hypervisor has ended.
            if timeout(HANG_UP, process.ended()).await.is_err() {
                process.kill();
                process.ended().await;
            }
            let _ = fs::remove_file(socket);
        }
    }
}

/// What a launcher executes itself as, to serve vsock.
pub(crate) const SERVE_VSOCK: &str = "serve-vsock";

/// Serves a hypervisor that connects to the socket that is standard input, until it hangs up; host programs connect to
/// `socket`.
pub(crate) fn serve_vsock(socket: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    VsockBackend::start(listener, socket, HYBRID_CID.into())?.join();
    Ok(())
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
