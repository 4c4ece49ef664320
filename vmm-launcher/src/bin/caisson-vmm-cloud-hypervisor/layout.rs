//! Where things are in Cloud Hypervisor's jail. They are at the same place for every VM, so that a snapshot of one can be
//! restored as another.

use std::{
    fs,
    path::{Path, PathBuf},
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

/// The run directory, whose sockets are removed when it is dropped.
#[derive(Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The one at `path`.
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// `name` in it, on the host.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The socket of the file server `id`, on the host.
    pub fn fs_socket(&self, id: &str) -> PathBuf {
        self.path(&fs_socket(id))
    }

    /// Removes the sockets.
    pub fn remove(&self) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if is_socket(&entry.file_name().to_string_lossy()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        self.remove();
    }
}

fn is_socket(name: &str) -> bool {
    [VSOCK, SERIAL].contains(&name) || name.starts_with("fs-") && name.ends_with(".sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_sockets_are_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(dir.path());
        for name in [VSOCK, SERIAL, "console.log"] {
            fs::write(run_dir.path(name), "").unwrap();
        }
        fs::write(run_dir.fs_socket("share"), "").unwrap();
        drop(run_dir);
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["console.log"]);
    }
}
