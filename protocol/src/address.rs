//! Where the two ends of a guest's vsock find each other.
//!
//! The guest always dials the host: once when the agent is ready, and once for each standard stream. On the host this
//! is either **kernel vsock** (`/dev/vhost-vsock`; the guest has a CID of its own) or **hybrid vsock** (the hypervisor
//! turns vsock into Unix sockets: a guest's call to port P arrives at `<socket>_P`; the guest's CID is always 3).

use std::{
    fmt, io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicU32, Ordering},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

/// The guest's CID under hybrid vsock.
pub const HYBRID_CID: u32 = 3;
/// In the guest: a shell for people, when the configuration allows one.
pub const DEBUG_CONSOLE_PORT: u32 = 1026;

/// The host port that the agent of the guest with `cid` dials when it is ready: 1024 for CID 3 and one more for each
/// CID above, because all guests with kernel vsock share the host's ports.
pub fn agent_port(cid: u32) -> u32 {
    1024u32.wrapping_add(cid.wrapping_sub(HYBRID_CID))
}

/// Somewhere to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `unix:<path>`
    Unix(PathBuf),
    /// `vsock:<cid>:<port>`
    Vsock {
        /// Context id: 2 is the host.
        cid: u32,
        /// The peer's port.
        port: u32,
    },
    /// `hvsock:<socket>:<port>`: into a guest, through its hypervisor's Unix socket.
    Hybrid {
        /// The hypervisor's socket.
        socket: PathBuf,
        /// The port in the guest.
        port: u32,
    },
}

/// Why a text is not an address.
#[derive(Debug, thiserror::Error)]
#[error("\"{0}\" is not an address: unix:<path>, vsock:<cid>:<port> or hvsock:<path>:<port>")]
pub struct InvalidAddress(String);

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let parse = || match text.split_once(':')? {
            ("unix", path) if !path.is_empty() => Some(Self::Unix(path.into())),
            ("vsock", rest) => {
                let (cid, port) = rest.split_once(':')?;
                Some(Self::Vsock { cid: cid.parse().ok()?, port: port.parse().ok()? })
            }
            ("hvsock", rest) => {
                let (socket, port) = rest.rsplit_once(':')?;
                Some(Self::Hybrid { socket: socket.into(), port: port.parse().ok()? })
            }
            _ => None,
        };
        parse().ok_or_else(|| InvalidAddress(text.escape_debug().to_string()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Hybrid { socket, port } => write!(f, "hvsock:{}:{port}", socket.display()),
        }
    }
}

impl Address {
    /// Connects once; there is no retry.
    ///
    /// # Errors
    /// When nobody listens, or the guest behind a hybrid vsock refuses.
    pub async fn connect(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).await?)),
            Self::Vsock { cid, port } => Ok(Stream::Vsock(VsockStream::connect(VsockAddr::new(*cid, *port)).await?)),
            Self::Hybrid { socket, port } => connect_hybrid(socket, *port).await.map(Stream::Unix),
        }
    }
}

async fn connect_hybrid(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // One byte at a time: what follows the line belongs to the caller.
    let mut answer = String::new();
    BufReader::with_capacity(1, &mut stream).read_line(&mut answer).await?;
    if answer.starts_with("OK ") {
        Ok(stream)
    } else {
        Err(io::Error::new(io::ErrorKind::ConnectionRefused, format!("nothing listens on port {port} in the guest")))
    }
}

/// A connected byte stream.
#[derive(Debug)]
pub enum Stream {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over kernel vsock.
    Vsock(VsockStream),
}

impl Stream {
    /// For ttrpc's client, or as the single connection of a server.
    pub fn into_ttrpc(self) -> ttrpc::asynchronous::transport::Socket {
        match self {
            Self::Unix(stream) => stream.into(),
            Self::Vsock(stream) => stream.into(),
        }
    }

    /// For [`crate::stream::copy`].
    ///
    /// # Errors
    /// When the runtime cannot let go of the descriptor.
    pub fn into_fd(self) -> io::Result<OwnedFd> {
        use std::os::fd::AsFd;
        match self {
            Self::Unix(stream) => Ok(stream.into_std()?.into()),
            Self::Vsock(stream) => stream.as_fd().try_clone_to_owned(),
        }
    }
}

/// The host's view of one guest's vsock, as the launcher answers it: `hvsock:<socket>` or `vsock:<cid>`.
#[derive(Debug)]
pub enum GuestVsock {
    /// The hypervisor's socket, and the next unused stream port.
    Hybrid {
        /// Its path.
        socket: PathBuf,
        /// Counts up from [`FIRST_STREAM_PORT`].
        next_port: AtomicU32,
    },
    /// The guest's context id.
    Kernel {
        /// Unique on the host.
        cid: u32,
    },
}

/// `VMADDR_PORT_ANY`, `vsock(7)`: the kernel chooses.
const ANY_PORT: u32 = u32::MAX;
/// Ports below are for services with a number of their own.
const FIRST_STREAM_PORT: u32 = 0x1_0000;

impl FromStr for GuestVsock {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let parse = || match text.split_once(':')? {
            ("hvsock", socket) if !socket.is_empty() => {
                Some(Self::Hybrid { socket: socket.into(), next_port: AtomicU32::new(FIRST_STREAM_PORT) })
            }
            ("vsock", cid) => Some(Self::Kernel { cid: cid.parse().ok()? }),
            _ => None,
        };
        parse().ok_or_else(|| InvalidAddress(text.escape_debug().to_string()))
    }
}

impl GuestVsock {
    /// Where the guest's agent will call.
    ///
    /// # Errors
    /// When the port is taken or the socket's path is too long.
    pub fn listen_for_agent(&self) -> io::Result<GuestListener> {
        match self {
            Self::Hybrid { .. } => self.listen(agent_port(HYBRID_CID)),
            Self::Kernel { cid } => self.listen(agent_port(*cid)),
        }
    }

    /// Where the guest will call once for one stream.
    ///
    /// # Errors
    /// As for [`Self::listen_for_agent`].
    pub fn listen_for_stream(&self) -> io::Result<GuestListener> {
        match self {
            Self::Hybrid { next_port, .. } => self.listen(next_port.fetch_add(1, Ordering::Relaxed)),
            Self::Kernel { .. } => self.listen(ANY_PORT),
        }
    }

    /// A service inside the guest.
    pub fn port(&self, port: u32) -> Address {
        match self {
            Self::Hybrid { socket, .. } => Address::Hybrid { socket: socket.clone(), port },
            Self::Kernel { cid } => Address::Vsock { cid: *cid, port },
        }
    }

    fn listen(&self, port: u32) -> io::Result<GuestListener> {
        match self {
            Self::Hybrid { socket, .. } => {
                let mut path = socket.clone().into_os_string();
                path.push(format!("_{port}"));
                let path = PathBuf::from(path);
                let listener = UnixListener::bind(&path)?;
                std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
                Ok(GuestListener { port, inner: Inner::Hybrid { listener, path } })
            }
            Self::Kernel { cid } => {
                let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_HOST, port))?;
                let port = listener.local_addr()?.port();
                Ok(GuestListener { port, inner: Inner::Kernel { listener, cid: *cid } })
            }
        }
    }
}

/// Waits for one call from one guest; the socket goes when this does.
#[derive(Debug)]
pub struct GuestListener {
    port: u32,
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Hybrid { listener: UnixListener, path: PathBuf },
    Kernel { listener: VsockListener, cid: u32 },
}

impl GuestListener {
    /// What the guest dials.
    pub fn address(&self) -> Address {
        Address::Vsock { cid: VMADDR_CID_HOST, port: self.port }
    }

    /// Waits for the guest. Calls from other guests are dropped.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub async fn accept(&self) -> io::Result<Stream> {
        match &self.inner {
            Inner::Hybrid { listener, .. } => Ok(Stream::Unix(listener.accept().await?.0)),
            Inner::Kernel { listener, cid } => loop {
                let (stream, peer) = listener.accept().await?;
                if peer.cid() == *cid {
                    return Ok(Stream::Vsock(stream));
                }
            },
        }
    }
}

impl Drop for GuestListener {
    fn drop(&mut self) {
        if let Inner::Hybrid { path, .. } = &self.inner {
            // The sandbox's directory goes as a whole; a socket left behind until then harms nobody.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[test]
    fn addresses_survive_being_printed() {
        for text in ["unix:/run/x.sock", "vsock:2:1024", "hvsock:/run/v.sock:1026"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "unix:", "vsock:2", "vsock:x:1", "hvsock:/x", "http://x"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_guests_call_arrives_at_the_socket_of_its_port() {
        let dir = tempfile::tempdir().unwrap();
        let vsock: GuestVsock = format!("hvsock:{}/v.sock", dir.path().display()).parse().unwrap();
        let listener = vsock.listen_for_agent().unwrap();
        let mut call = UnixStream::connect(dir.path().join("v.sock_1024")).await.unwrap();
        let Stream::Unix(mut accepted) = listener.accept().await.unwrap() else { panic!("not a Unix stream") };
        call.write_all(b"ready").await.unwrap();
        let mut heard = [0; 5];
        accepted.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"ready");
        drop(listener);
        assert!(!dir.path().join("v.sock_1024").exists());
    }

    #[tokio::test]
    async fn a_refused_hybrid_connection_names_the_port() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let hypervisor = tokio::spawn(async move { drop(listener.accept().await) });
        let error = Address::Hybrid { socket, port: 99 }.connect().await.unwrap_err();
        hypervisor.await.unwrap();
        assert!(error.to_string().contains("port 99") || error.kind() == io::ErrorKind::ConnectionReset, "{error}");
    }
}
