//! What the host shows one container through the shared directory: its root filesystem and its bind mounts.
//!
//! `<sandbox>/shared/<container>/rootfs` and `…/mounts/<n>`; the guest sees the same below
//! [`caisson_protocol::paths::GUEST_SHARED_DIR`].

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use caisson_protocol::{
    containerd::api::Mount,
    id::Id,
    paths::{GUEST_SHARED_DIR, SandboxDir},
};

use crate::{
    Error, Result,
    guest_spec::SharedPath,
    mount::{bind, mount_at, unmount_below},
};

/// One container's folder; dropping it unmounts and removes.
#[derive(Debug)]
pub struct ContainerShare {
    directory: PathBuf,
}

impl ContainerShare {
    /// Mounts the root filesystem, unless it comes another way, and the shared paths. Takes as long as the kernel's
    /// mounts do: not for the async thread.
    pub fn prepare(sandbox: &SandboxDir, id: &Id, rootfs: &[Mount], paths: &[SharedPath]) -> Result<Self> {
        let directory = sandbox.shared().join(id.as_str());
        fs::create_dir_all(&directory).map_err(Error::host(format!("make {}", directory.display())))?;
        // From here on dropping it cleans up.
        let share = Self { directory };
        let target = share.directory.join("rootfs");
        fs::create_dir_all(&target).map_err(Error::host(format!("make {}", target.display())))?;
        for mount in rootfs {
            let action = format!("mount the container's root filesystem, {} from {}", mount.type_, mount.source);
            mount_at(mount, &target).map_err(Error::host(action))?;
        }
        for path in paths {
            let action = format!("share {} with the guest", path.source.display());
            share.add(path).map_err(Error::host(action))?;
        }
        Ok(share)
    }

    /// How the guest mounts the root filesystem.
    pub fn guest_rootfs(id: &Id) -> Mount {
        Mount {
            type_: "bind".into(),
            source: format!("{GUEST_SHARED_DIR}/{id}/rootfs"),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        }
    }

    fn add(&self, path: &SharedPath) -> io::Result<()> {
        let target = self.directory.join("mounts").join(&path.name);
        if fs::metadata(&path.source)?.is_dir() {
            fs::create_dir_all(&target)?;
        } else {
            fs::create_dir_all(self.directory.join("mounts"))?;
            fs::write(&target, [])?;
        }
        bind(&path.source, &target, path.recursive)
    }
}

impl Drop for ContainerShare {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.directory) {
            tracing::warn!(directory = %self.directory.display(), %error, "a container's shared folder stays behind");
        }
    }
}

/// Unmounts a container's folder and removes it. Only empty files and folders are removed: should a mount still be
/// there, nothing of what it shows is touched.
pub fn remove(directory: &Path) -> io::Result<()> {
    if !directory.exists() {
        return Ok(());
    }
    unmount_below(directory)?;
    let mounts = directory.join("mounts");
    if mounts.exists() {
        for entry in fs::read_dir(&mounts)? {
            let path = entry?.path();
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                fs::remove_dir(&path)?;
            } else if metadata.len() == 0 {
                fs::remove_file(&path)?;
            }
        }
        fs::remove_dir(&mounts)?;
    }
    match fs::remove_dir(directory.join("rootfs")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::remove_dir(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_still_shows_something_is_not_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("web/rootfs");
        fs::create_dir_all(&rootfs).unwrap();
        fs::write(rootfs.join("precious"), "data").unwrap();
        assert!(remove(&dir.path().join("web")).is_err());
        assert_eq!(fs::read_to_string(rootfs.join("precious")).unwrap(), "data");
    }

    #[test]
    fn a_folder_with_empty_mount_points_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("web");
        fs::create_dir_all(share.join("rootfs")).unwrap();
        fs::create_dir_all(share.join("mounts/0")).unwrap();
        fs::write(share.join("mounts/1"), []).unwrap();
        remove(&share).unwrap();
        assert!(!share.exists());
    }
}
