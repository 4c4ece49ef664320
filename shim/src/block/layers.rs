//! What a root filesystem consists of, read from the mount that containerd's snapshotter describes.

use std::path::PathBuf;

use caisson_protocol::containerd::api::Mount;

use crate::{Error, Result};

/// How options begin that name other attributes or other owners than a layer's files have.
const OF_A_USER_NAMESPACE: [&str; 3] = ["userxattr", "uidmap=", "gidmap="];

/// Directories of the host that lie over one another.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Layers {
    /// Snapshots that were committed and never change, the topmost first.
    pub committed: Vec<PathBuf>,
    /// What lies over them and is this container's alone: most often still empty.
    pub own: Option<PathBuf>,
}

impl Layers {
    /// Reads containerd's mounts.
    ///
    /// # Errors
    /// When they are not what the snapshotters `overlayfs` and `native` give.
    pub fn of(rootfs: &[Mount]) -> Result<Self> {
        let [mount] = rootfs else {
            return Err(refused(format!("it is {} mounts where one is expected", rootfs.len())));
        };
        let is_foreign = |word: &&String| OF_A_USER_NAMESPACE.iter().any(|sign| word.starts_with(sign));
        if let Some(option) = mount.options.iter().find(is_foreign) {
            return Err(refused(format!("its layers are a user namespace's ({option})")));
        }
        let is_bind = mount.type_ == "bind" || mount.options.iter().any(|word| word == "bind" || word == "rbind");
        if is_bind {
            return Ok(Self::of_bind(mount));
        }
        if mount.type_ == "overlay" {
            Self::of_overlay(mount)
        } else {
            Err(refused(format!("its type is {}", mount.type_)))
        }
    }

    /// One layer: read-only it is a committed snapshot, else one that is being written.
    fn of_bind(mount: &Mount) -> Self {
        let source = PathBuf::from(&mount.source);
        if mount.options.iter().any(|word| word == "ro") {
            Self { committed: vec![source], own: None }
        } else {
            Self { committed: Vec::new(), own: Some(source) }
        }
    }

    fn of_overlay(mount: &Mount) -> Result<Self> {
        let option = |name: &str| mount.options.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let lower = option("lowerdir").ok_or_else(|| refused("its overlay has no lowerdir"))?;
        Ok(Self {
            committed: lower.split(':').map(PathBuf::from).collect(),
            own: option("upperdir").map(PathBuf::from),
        })
    }
}

fn refused(why: impl std::fmt::Display) -> Error {
    Error::Unsupported(format!(
        "make disks of the container's root filesystem: {why}; containerd's snapshotter must be overlayfs, or the \
         configuration's rootfs \"virtio-fs\""
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> [Mount; 1] {
        let options = options.iter().map(ToString::to_string).collect();
        [Mount { type_: kind.into(), source: source.into(), options, ..Default::default() }]
    }

    #[test]
    fn an_overlay_has_its_lower_layers_and_its_own() {
        let overlay = mount(
            "overlay",
            "overlay",
            &["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"],
        );
        let layers = Layers::of(&overlay).unwrap();
        assert_eq!(layers.committed, [PathBuf::from("/s/2/fs"), PathBuf::from("/s/1/fs")]);
        assert_eq!(layers.own, Some("/s/3/fs".into()));
    }

    #[test]
    fn a_view_of_one_layer_is_that_layer() {
        let layers = Layers::of(&mount("bind", "/s/1/fs", &["ro", "rbind"])).unwrap();
        assert_eq!(layers, Layers { committed: vec!["/s/1/fs".into()], own: None });
    }

    #[test]
    fn a_snapshot_that_stands_on_none_is_the_containers_own() {
        let layers = Layers::of(&mount("bind", "/s/1/fs", &["rw", "rbind"])).unwrap();
        assert_eq!(layers, Layers { committed: Vec::new(), own: Some("/s/1/fs".into()) });
    }

    #[test]
    fn what_is_no_directory_is_refused_with_what_would_do() {
        let error = Layers::of(&mount("ext4", "/dev/dm-1", &[])).unwrap_err().to_string();
        assert!(error.contains("its type is ext4; containerd's snapshotter must be overlayfs"), "{error}");
        assert!(Layers::of(&[]).is_err());
    }

    #[test]
    fn layers_of_a_user_namespace_are_refused() {
        let overlay = mount("overlay", "overlay", &["userxattr", "lowerdir=/s/1/fs"]);
        assert!(Layers::of(&overlay).unwrap_err().to_string().contains("userxattr"));
    }

    #[test]
    fn layers_that_are_shown_with_other_owners_are_refused() {
        let overlay =
            mount("overlay", "overlay", &["lowerdir=/s/1/fs", "uidmap=0:65536:65536", "gidmap=0:65536:65536"]);
        let error = Layers::of(&overlay).unwrap_err().to_string();
        assert!(error.contains("its layers are a user namespace's (uidmap=0:65536:65536);"), "{error}");
        assert!(Layers::of(&mount("bind", "/s/1/fs", &["ro", "gidmap=0:65536:65536"])).is_err());
    }
}
