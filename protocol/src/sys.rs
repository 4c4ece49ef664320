//! The one unsafe call of this crate.
#![allow(unsafe_code)]

use std::{io, os::fd::OwnedFd};

use tokio::io::unix::AsyncFd;

/// Registers `fd` with the runtime, or gives it back with the reason.
///
/// # Errors
/// When it is nothing that can be waited for.
pub fn register(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, (OwnedFd, io::Error)> {
    // SAFETY: an `OwnedFd` always answers the same descriptor and keeps it open until it is dropped, and `AsyncFd`
    // owns it from here on.
    unsafe { AsyncFd::register(fd) }.map_err(|refused| refused.into_parts())
}
