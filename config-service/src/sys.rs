//! The one place where the compiler cannot see why something is sound.
#![allow(unsafe_code, reason = "what tokio is told of a descriptor and glibc of its heap are unsafe calls")]

use std::{io, os::fd::OwnedFd};

use tokio::io::unix::AsyncFd;

/// `fd` with tokio's events, for a descriptor that does not block.
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always answers the same descriptor, and keeps it open until the `AsyncFd` that owns it is
    // dropped, which ends the registration first.
    unsafe { AsyncFd::register(fd) }.map_err(|refused| refused.into_parts().1)
}

/// Gives back to the kernel what the heap does not need any more, `malloc_trim(3)`.
pub(crate) fn trim_heap() {
    // SAFETY: it takes glibc's own locks and moves nothing that is allocated.
    unsafe { libc::malloc_trim(0) };
}
