//! The virtio socket device (virtio 1.2 §5.10), spoken to the host as *hybrid vsock*.
//!
//! One engine serves two kinds of hypervisor: those that delegate the device over vhost-user
//! ([`VsockBackend`]; QEMU where `/dev/vhost-vsock` is missing) and a VMM that owns its
//! virtqueues itself ([`VsockDevice`]). It is not a client: `caisson_protocol` dials hybrid
//! sockets, this module answers them.
//!
//! ```text
//!  host programs            muxer.rs                       device.rs            guest
//!  ─────────────            ────────                       ─────────            ─────
//!  connect(uds) ──────────► handshake.rs: "CONNECT 1024\n"
//!               ◄────────── "OK 1073741824\n"  ◄─ RESPONSE ◄─┐
//!                           connection.rs ──────► REQUEST ──►│ rx virtqueue ──► listen(1024)
//!  bytes ◄────────────────► one per stream: ────► packet.rs ►│ tx virtqueue ◄── connect(2, P)
//!  listen(uds_P) ◄───────── credit, shutdown                 │
//!                                                            └─ backend.rs: vhost-user
//! ```
//!
//! * host → guest: connect to `uds`, write `CONNECT <port>\n`, read `OK <host port>\n`; the
//!   socket is closed without a reply when the guest refuses.
//! * guest → host: a guest that dials CID 2, port `P`, reaches the Unix socket `<uds>_<P>`; when
//!   nobody listens there it gets a reset.
//!
//! Bytes move between the host socket and guest memory without a copy of our own, except while a
//! host program does not read: then at most [`RECEIVE_WINDOW`] bytes per connection wait here,
//! because that is all the credit that a guest gets.

mod backend;
mod connection;
mod credit;
mod device;
mod handshake;
mod listener;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

pub use backend::VsockBackend;
pub use connection::RECEIVE_WINDOW;
pub use device::{Progress, VsockDevice};

use std::path::PathBuf;

/// The context id of the host, as a guest dials it (virtio 1.2 §5.10.4).
pub const HOST_CID: u64 = 2;

/// Why a vsock device could not be set up. Once it serves, nothing that a guest or a host program
/// does ends it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `<uds>_<port>` would not fit into a socket address.
    #[error("vsock socket path {path} is too long: {length} bytes, at most {limit}")]
    PathTooLong {
        /// The path that was asked for.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
        /// The longest path that leaves room for `_<port>`.
        limit: usize,
    },
    /// Binding the hybrid vsock socket failed.
    #[error("listen for vsock connections on {path}")]
    Listen {
        /// The path that was asked for.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A context id that virtio reserves, or one that is wider than 32 bits.
    #[error("guest cid {0} is not usable: it must be from 3 to 4294967294")]
    GuestCid(u64),
    /// The kernel refused an epoll instance, a timer, a descriptor or a thread.
    #[error("set up the vsock device: {what}")]
    Setup {
        /// What was being made.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The vhost-user library could not start.
    #[error("set up the vsock device's vhost-user service: {0}")]
    VhostUser(String),
}
