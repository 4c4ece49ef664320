//! Where things are in Cloud Hypervisor's jail. They are at the same place for every VM, so that a snapshot of one can be
//! restored as another.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

/// The VM's run directory.
pub const RUN: &str = "/run";
pub const KERNEL: &str = "/kernel";
pub const INITRD: &str = "/initrd";
pub const IMAGE: &str = "/image";
/// Holds a disk or pmem image for each device, by its id.
pub const DISKS: &str = "/disks";
/// Holds [`SNAPSHOT`] while there is one.
pub const SNAPSHOTS: &str = "/snapshots";
pub const SNAPSHOT: &str = "/snapshots/this";
/// Holds the IOMMU groups of devices of the host.
pub const GROUPS: &str = "/dev/vfio";
/// Holds the sysfs directories of devices of the host, by their addresses.
pub const HOST_DEVICES: &str = "/sys/bus/pci/devices";
/// An empty directory: Landlock's rules for a restored network card name it, and Cloud Hypervisor never opens it.
pub const NO_TUN: &str = "/dev/net/tun";
/// What may be filled while the VM runs.
pub const FILLED_LATER: [&str; 4] = [DISKS, SNAPSHOTS, GROUPS, HOST_DEVICES];

/// In the run directory.
pub const VSOCK: &str = "vsock.sock";
pub const SERIAL: &str = "serial.sock";
/// Or in the state directory, which Cloud Hypervisor does not see.
pub const API: &str = "api.sock";

/// `name` in the run directory, as Cloud Hypervisor sees it.
pub fn in_run(name: &str) -> String {
    format!("{RUN}/{name}")
}

/// The disk `id`, as Cloud Hypervisor sees it.
pub fn disk(id: &str) -> String {
    format!("{DISKS}/{id}")
}

/// The device of the host at `address`, as Cloud Hypervisor sees it.
pub fn host_device(address: &str) -> String {
    format!("{HOST_DEVICES}/{address}")
}

/// Where the file server `id` listens, in the run directory.
pub fn fs_socket(id: &str) -> String {
    format!("fs-{id}.sock")
}

/// The sockets in the run directory; removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    names: Mutex<Vec<String>>,
}

impl RunDir {
    /// `path`, which has no sockets yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), names: Mutex::new(vec![VSOCK.into(), SERIAL.into()]) }
    }

    /// `path` with the sockets `names`.
    pub fn adopt(path: &Path, names: Vec<String>) -> Self {
        Self { path: path.to_owned(), names: Mutex::new(names) }
    }

    /// The sockets' names.
    pub fn names(&self) -> Vec<String> {
        self.names.lock().expect("nobody panics with the names").clone()
    }

    /// `name` in it, on the host.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The socket of the file server `id`, on the host.
    pub fn fs_socket(&self, id: &str) -> PathBuf {
        let name = fs_socket(id);
        let path = self.path(&name);
        self.names.lock().expect("nobody panics with the names").push(name);
        path
    }

    /// Removes the sockets.
    pub fn remove(&self) {
        for name in self.names.lock().expect("nobody panics with the names").drain(..) {
            let _ = fs::remove_file(self.path.join(name));
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        self.remove();
    }
}
