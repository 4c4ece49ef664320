//! The guest's serial port as acrn-dm wants it, a terminal, carried to the library's console, a socket.

use std::{
    fs::File,
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    thread,
};

use nix::{
    pty::openpty,
    sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
    unistd::ttyname,
};

/// A terminal that stays open until this is dropped; then the console hears of its end, when nobody else has it open.
#[derive(Debug)]
pub struct Pty {
    _slave: OwnedFd,
    path: PathBuf,
}

impl Pty {
    /// Carries both ways between a new terminal and `console`, a connected stream socket.
    ///
    /// # Errors
    /// When the host has no terminals or threads left.
    pub fn open(console: OwnedFd) -> io::Result<Self> {
        let pty = openpty(None, None)?;
        // From the start: what is written before acrn-dm does the same must not be echoed.
        let mut raw = tcgetattr(&pty.slave)?;
        cfmakeraw(&mut raw);
        tcsetattr(&pty.slave, SetArg::TCSANOW, &raw)?;
        let path = ttyname(pty.slave.as_fd())?;
        let console = UnixStream::from(console);
        let (mut input, mut output) = (console.try_clone()?, console);
        let (mut reader, mut writer) = (File::from(pty.master.try_clone()?), File::from(pty.master));
        thread::Builder::new().name("console-output".into()).spawn(move || {
            // A terminal that nobody has open any more answers EIO: the guest has ended.
            let _ = io::copy(&mut reader, &mut output);
            let _ = output.shutdown(Shutdown::Both);
        })?;
        thread::Builder::new().name("console-input".into()).spawn(move || io::copy(&mut input, &mut writer))?;
        Ok(Self { _slave: pty.slave, path })
    }

    /// For acrn-dm.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
