//! Where things are in Firecracker's jail. They are at the same place for every VM, so that a snapshot of one can be
//! restored as another.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use caisson_vmm_launcher::{Error, Result};
use nix::{fcntl::OFlag, sys::stat::Mode, unistd::mkfifo};
use tokio::net::unix::pipe;

/// The VM's run directory.
pub const RUN: &str = "/run";
pub const KERNEL: &str = "/kernel";
pub const INITRD: &str = "/initrd";
pub const IMAGE: &str = "/image";
/// Holds a disk or pmem image for each device, by its id.
pub const DISKS: &str = "/disks";
pub const SNAPSHOT: &str = "/snapshot";

/// In the run directory.
pub const API: &str = "firecracker.sock";
pub const VSOCK: &str = "vsock.sock";
pub const LOG: &str = "firecracker.log";
pub const METRICS: &str = "firecracker.metrics";
/// What is behind a spare disk.
pub const EMPTY: &str = "empty";

/// `name` in the run directory, as Firecracker sees it.
pub fn in_run(name: &str) -> String {
    format!("{RUN}/{name}")
}

/// The disk `id`, as Firecracker sees it.
pub fn disk(id: &str) -> String {
    format!("{DISKS}/{id}")
}

/// Opens the named pipe `path`, and nothing else that Firecracker may have put there.
pub fn open_pipe(path: &Path) -> io::Result<pipe::Receiver> {
    // Also for writing, so that it does not end before Firecracker has opened it.
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW).bits();
    pipe::Receiver::from_file(File::options().read(true).write(true).custom_flags(flags).open(path)?)
}

/// The launcher's and Firecracker's files in the run directory; removed when dropped.
#[derive(Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// Makes those that must be there when Firecracker starts.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn prepare(path: &Path) -> Result<Self> {
        let run_dir = Self(path.to_owned());
        let made = || {
            mkfifo(&run_dir.path(LOG), Mode::S_IRUSR | Mode::S_IWUSR)?;
            mkfifo(&run_dir.path(METRICS), Mode::S_IRUSR | Mode::S_IWUSR)?;
            File::create(run_dir.path(EMPTY)).map(drop)
        };
        made().map_err(Error::host(format!("make files in {}", path.display())))?;
        Ok(run_dir)
    }

    /// That of an adopted Firecracker.
    pub fn adopt(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// `name` in it, on the host.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        for name in [API, VSOCK, LOG, METRICS, EMPTY] {
            let _ = fs::remove_file(self.path(name));
        }
    }
}
