//! A server's listening socket, made by whoever starts the server and inherited as its standard input.
//!
//! The starter can connect before the server runs: the connection waits in the socket's queue, so nobody polls for
//! readiness. systemd passes a socket the same way with `StandardInput=socket`.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    process::Stdio,
};

use nix::sys::socket::{getsockopt, sockopt};

/// Makes the socket at `path`, replacing a stale one. The path may have 107 bytes, `unix(7)`.
///
/// # Errors
/// When the path is too long, its directory does not exist or may not be written.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}

/// The socket as a child's standard input.
pub fn as_stdin(listener: UnixListener) -> Stdio {
    Stdio::from(OwnedFd::from(listener))
}

/// The socket that this process was given, ready for ttrpc's server.
///
/// # Errors
/// When standard input is not a listening socket: the program was started by hand.
pub fn inherited() -> io::Result<ttrpc::asynchronous::transport::Listener> {
    let fd = io::stdin().as_fd().try_clone_to_owned()?;
    if !getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "standard input is not a listening socket"));
    }
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(tokio::net::UnixListener::from_std(listener)?.into())
}
