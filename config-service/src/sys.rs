//! The one place where the compiler cannot see why something is sound.
#![allow(unsafe_code, reason = "tokio's own event loop is told about a descriptor by an unsafe call")]

use std::{io, os::fd::OwnedFd};

use tokio::io::unix::AsyncFd;

/// `fd` with tokio's events, for a descriptor that does not block.
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always answers the same descriptor, and keeps it open until the `AsyncFd` that owns it is
    // dropped, which ends the registration first.
    unsafe { AsyncFd::register(fd) }.map_err(|refused| refused.into_parts().1)
}
