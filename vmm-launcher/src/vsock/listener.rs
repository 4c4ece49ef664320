//! The host's sockets as they come into being: the one that clients connect to, and those that we connect to for the
//! guest.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};

use super::Error;

/// The longest socket path (`sockaddr_un`, without the final zero), less `_4294967295`.
const PATH_LIMIT: usize = 107 - 11;

/// The hybrid vsock socket; its path is removed with it.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens on `path`, which must not exist.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let length = path.as_os_str().len();
        if length > PATH_LIMIT {
            return Err(Error::PathTooLong { path: path.into(), length, limit: PATH_LIMIT });
        }
        let failed = |source| Error::Listen { path: path.into(), source };
        let socket = UnixListener::bind(path).map_err(failed)?;
        let listener = Self { socket, path: path.into() };
        listener.socket.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }

    /// The next client that waits, if one does.
    pub fn accept(&self) -> io::Result<UnixStream> {
        loop {
            match self.socket.accept() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => {
                    let (client, _) = result?;
                    client.set_nonblocking(true)?;
                    return Ok(client);
                }
            }
        }
    }

    /// Connects to the program that serves `port` of CID 2, without ever blocking: one whose queue of clients is full
    /// is as good as none.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        socket::connect(socket.as_raw_fd(), &UnixAddr::new(path.as_os_str())?)?;
        Ok(UnixStream::from(socket))
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> i32 {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody else may have removed it, which is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}
