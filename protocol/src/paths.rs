//! Where things lie, on the host and in the guest.

use std::{
    env, io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::id::Id;

/// Overrides [`DEFAULT_RUN_DIR`], for a second installation on one host.
pub const RUN_DIR_VARIABLE: &str = "CAISSON_RUN_DIR";
/// Everything that lives as long as a sandbox; a tmpfs.
pub const DEFAULT_RUN_DIR: &str = "/run/caisson";

/// Where the guest mounts what the host shares: one folder per container.
pub const GUEST_SHARED_DIR: &str = "/run/caisson/shared";
/// Where the guest keeps bundles: one folder per container.
pub const GUEST_BUNDLE_DIR: &str = "/run/caisson/bundles";
/// Where the guest mounts disks that containers may share: one folder per disk.
pub const GUEST_LAYERS_DIR: &str = "/run/caisson/layers";
/// Where the guest makes root filesystems of disks: one folder per container.
pub const GUEST_ROOTFS_DIR: &str = "/run/caisson/rootfs";
/// The virtio-fs tag of [`GUEST_SHARED_DIR`].
pub const SHARED_TAG: &str = "caisson";

/// The run directory in force.
pub fn run_dir() -> PathBuf {
    env::var_os(RUN_DIR_VARIABLE).map_or_else(|| DEFAULT_RUN_DIR.into(), PathBuf::from)
}

/// The config-service's socket.
pub fn config_socket() -> PathBuf {
    run_dir().join("config.sock")
}

/// All sandboxes' directories.
pub fn sandboxes_dir() -> PathBuf {
    run_dir().join("sandboxes")
}

/// One sandbox's directory: its name is a digest, so that sockets below it keep to the 107 bytes of `unix(7)` whatever
/// containerd's names are. `sandbox.json` inside says whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxDir(PathBuf);

impl SandboxDir {
    /// The directory of sandbox `id` in containerd's `namespace`.
    pub fn of(namespace: &Id, id: &Id) -> Self {
        let digest = Sha256::digest(format!("{namespace}/{id}"));
        let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Self(sandboxes_dir().join(name))
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Who the sandbox is and which processes serve it.
    pub fn record(&self) -> PathBuf {
        self.0.join("sandbox.json")
    }

    /// The shim's socket: containerd's Task service, and the Sandbox service for people's tools.
    pub fn shim_socket(&self) -> PathBuf {
        self.0.join("shim.sock")
    }

    /// The launcher's socket.
    pub fn vmm_socket(&self) -> PathBuf {
        self.0.join("vmm.sock")
    }

    /// Where hybrid vsock listens.
    pub fn vsock_socket(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    /// The guest console's log.
    pub fn console_log(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// What the guest sees at [`GUEST_SHARED_DIR`].
    pub fn shared(&self) -> PathBuf {
        self.0.join("shared")
    }

    /// The launcher's own files.
    pub fn launcher(&self) -> PathBuf {
        self.0.join("vmm")
    }

    /// Makes the directory, for root only.
    ///
    /// # Errors
    /// `AlreadyExists` when the sandbox already has one.
    pub fn create(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::create_dir_all(sandboxes_dir())?;
        std::fs::DirBuilder::new().mode(0o700).create(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_names_still_leave_room_for_a_socket_with_a_port() {
        let id = Id::parse("container id", &"a".repeat(76)).unwrap();
        let longest = format!("{}_{}", SandboxDir::of(&id, &id).vsock_socket().display(), u32::MAX);
        assert!(longest.len() <= 107, "{longest}");
    }

    #[test]
    fn two_namespaces_do_not_share_a_sandbox() {
        let (a, b, id) = (Id::parse("", "a").unwrap(), Id::parse("", "b").unwrap(), Id::parse("", "web").unwrap());
        assert_ne!(SandboxDir::of(&a, &id), SandboxDir::of(&b, &id));
    }
}
