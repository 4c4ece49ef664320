//! What a guest does in the integrity tests: it moves the pattern that it shares with the test, and ends with an error when
//! it gets anything else.
//!
//! ```text
//! guest-load write|check FILE MIB
//! guest-load connect ADDRESS:PORT MIB      a TCP connection
//! guest-load vsock PORT MIB                waits for a connection, and then makes one to the port that it is told there
//! ```

use std::{
    fs::File,
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    libc::{VMADDR_CID_ANY, VMADDR_CID_HOST},
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket},
};

#[path = "../tests/launcher/pattern.rs"]
mod pattern;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [action, target, mib] = arguments.as_slice() else { return Err(io::ErrorKind::InvalidInput.into()) };
    let mib = mib.parse().map_err(io::Error::other)?;
    match action.as_str() {
        "write" => {
            let mut file = File::create(target)?;
            pattern::write(&mut file, mib)?;
            file.sync_all()
        }
        "check" => pattern::check(&mut File::open(target)?, mib),
        "connect" => {
            let stream = TcpStream::connect(target)?;
            pattern::exchange(&stream, &stream, mib)
        }
        "vsock" => vsock(target.parse().map_err(io::Error::other)?, mib),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn vsock(port: u32, mib: usize) -> io::Result<()> {
    let listener = vsock_socket()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::new(1)?)?;
    println!("guest: listening");
    let mut from_host = File::from(rustix::net::accept(&listener)?);
    pattern::exchange(&from_host, &from_host, mib)?;

    let mut port = [0; 4];
    from_host.read_exact(&mut port)?;
    let to_host = vsock_socket()?;
    connect(to_host.as_raw_fd(), &VsockAddr::new(VMADDR_CID_HOST, u32::from_le_bytes(port)))?;
    let mut to_host = File::from(to_host);
    pattern::exchange(&to_host, &to_host, mib)?;
    // The host's end has read everything when it answers.
    to_host.write_all(&[0])?;
    to_host.read_exact(&mut [0])
}

fn vsock_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}
