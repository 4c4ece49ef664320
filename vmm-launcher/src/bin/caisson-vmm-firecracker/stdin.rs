//! The guest's input from a terminal: Firecracker reads its standard input only from a terminal or a pipe.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
};

/// Carries bytes until it is dropped.
#[derive(Debug)]
pub struct Input(UnixStream);

impl Input {
    /// Carries what arrives at `console`, the hypervisor's end of it, to the pipe whose other end is the answer.
    ///
    /// # Errors
    /// When the host makes no pipe or thread.
    pub fn carry(console: impl AsFd) -> io::Result<(Self, OwnedFd)> {
        let console = UnixStream::from(console.as_fd().try_clone_to_owned()?);
        let (reader, mut writer) = io::pipe()?;
        let mut from = console.try_clone()?;
        // A thread, because the socket has to be a blocking one: Firecracker writes to it, and would lose what does not
        // fit at once.
        thread::Builder::new().name("input".into()).spawn(move || {
            let mut buffer = [0; 256];
            // Not `io::copy`: it would splice, and the kernel keeps the pipe's readers out while it waits for the socket.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                if writer.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
        })?;
        Ok((Self(console), reader.into()))
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        // The thread reads the end.
        let _ = self.0.shutdown(Shutdown::Read);
    }
}
