//! Waits for hardware: the kernel tells when a device appears, nobody looks again and again.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::{
    error::{Attempt, Error, Result},
    sys,
};

/// The kernel's own multicast group, `lib/kobject_uevent.c`.
const KERNEL_GROUP: u32 = 1;
/// As long as an event can be, `UEVENT_BUFFER_SIZE` with its header.
const LARGEST: usize = 8192;

/// Looks with `find` now, and again after each thing that the kernel tells, until there is an answer.
///
/// # Errors
/// When there is none after `limit`; `what` is looked for.
pub async fn until<T>(what: &str, limit: Duration, mut find: impl FnMut() -> Option<T>) -> Result<T> {
    // Listen first, look then: nothing is missed in between.
    let events = Events::listen().attempt("listen for devices")?;
    let found = async {
        loop {
            if let Some(found) = find() {
                return Ok(found);
            }
            events.next().await.attempt("listen for devices")?;
        }
    };
    match timeout(limit, found).await {
        Ok(found) => found,
        Err(_) => Err(Error::NotFound(format!("{what} did not appear within {limit:?}"))),
    }
}

struct Events(AsyncFd<OwnedFd>);

impl Events {
    fn listen() -> std::io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let kernel = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
        bind(kernel.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self(sys::register(kernel, Interest::READABLE)?))
    }

    /// Waits for the next event. What it says does not matter: whoever waits looks for itself.
    async fn next(&self) -> std::io::Result<()> {
        let mut buffer = [0; LARGEST];
        loop {
            let mut ready = self.0.readable().await?;
            let received = ready.try_io(|kernel| Ok(recv(kernel.as_raw_fd(), &mut buffer, MsgFlags::empty())?));
            match received {
                // Too many to keep: something happened all the same.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => return Ok(()),
                Ok(done) => return done.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_there_already_is_found_at_once() {
        assert_eq!(until("a disk", Duration::from_secs(1), || Some(7)).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn what_never_appears_is_named() {
        let error = until("disk serial:x", Duration::ZERO, || None::<()>).await.unwrap_err();
        assert!(error.to_string().starts_with("disk serial:x did not appear"), "{error}");
    }
}
