//! What the host shares with the guest: virtio-fs folders, disks, and what is made of them.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_protocol::guest::Storage;

use crate::{
    error::{Attempt, Error, Result},
    mounts, uevents,
};

/// How long a disk that was plugged in may take to be seen.
const DISK_LIMIT: Duration = Duration::from_secs(10);

/// Mounts `storage`, after its disk has appeared when it is one.
///
/// # Errors
/// When the driver is unknown, the disk does not appear, or the kernel refuses.
pub async fn add(storage: &Storage) -> Result<()> {
    let target = target(&storage.mount_point)?;
    let (kind, source) = match storage.driver.as_str() {
        "virtio-fs" => ("virtiofs", storage.source.clone()),
        "block" => (storage.fstype.as_str(), disk(&storage.source).await?.display().to_string()),
        "bind" => ("bind", storage.source.clone()),
        "tmpfs" => ("tmpfs", "tmpfs".into()),
        "overlay" => {
            make_layers(&storage.options)?;
            ("overlay", "overlay".into())
        }
        other => {
            return Err(Error::Invalid(format!(
                "storage driver \"{}\" is none of virtio-fs, block, bind, tmpfs, overlay",
                other.escape_debug()
            )));
        }
    };
    mounts::mount_on(target, kind, &source, &storage.options)
}

/// Unmounts what is mounted at `mount_point` and below.
///
/// # Errors
/// When the kernel refuses.
pub fn remove(mount_point: &str) -> Result<()> {
    let target = target(mount_point)?;
    mounts::unmount_below(target)?;
    // A directory that was there before, or holds other things, stays.
    let _ = fs::remove_dir(target);
    Ok(())
}

fn target(mount_point: &str) -> Result<&Path> {
    let target = Path::new(mount_point);
    if target.is_absolute() && target.parent().is_some() {
        Ok(target)
    } else {
        Err(Error::Invalid(format!("mount point \"{}\" is not an absolute path", mount_point.escape_debug())))
    }
}

/// The layer that is written to, and its work directory, begin empty. The first has the owner and the mode of the layer
/// below it, which is what overlayfs then shows of the whole.
fn make_layers(options: &[String]) -> Result<()> {
    let option = |name: &str| options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
    for path in ["upperdir", "workdir"].into_iter().filter_map(option) {
        fs::create_dir_all(path).attempt(format_args!("make {path}"))?;
    }
    if let (Some(upper), Some(below)) = (option("upperdir"), option("lowerdir").and_then(|all| all.split(':').next())) {
        let like_below = || {
            let below = fs::metadata(below)?;
            chown(upper, Some(below.uid()), Some(below.gid()))?;
            fs::set_permissions(upper, below.permissions())
        };
        like_below().attempt(format_args!("give {upper} the owner and mode of {below}"))?;
    }
    Ok(())
}

/// The device node of `serial:<name>` or `pci:<address>`.
async fn disk(source: &str) -> Result<PathBuf> {
    let find: Box<dyn FnMut() -> Option<PathBuf> + Send> = match source.split_once(':') {
        Some(("serial", serial)) if !serial.is_empty() => {
            let serial = serial.to_owned();
            Box::new(move || find_by_serial(Path::new("/sys/block"), &serial))
        }
        Some(("pci", address)) if is_pci_address(address) => {
            let device = Path::new("/sys/bus/pci/devices").join(address);
            Box::new(move || find_below(&device))
        }
        _ => {
            return Err(Error::Invalid(format!(
                "disk \"{}\" is neither serial:<name> nor pci:<address>",
                source.escape_debug()
            )));
        }
    };
    uevents::until(&format!("disk {source}"), DISK_LIMIT, looking_at_the_bus(find)).await
}

/// Some hypervisors plug a disk in and tell nobody: after the first look, have the kernel look at its bus.
fn looking_at_the_bus<T>(mut find: impl FnMut() -> Option<T>) -> impl FnMut() -> Option<T> {
    let mut looked = false;
    move || {
        let found = find();
        if found.is_none() && !looked {
            looked = true;
            let _ = fs::write("/sys/bus/pci/rescan", "1");
            return find();
        }
        found
    }
}

fn find_by_serial(blocks: &Path, serial: &str) -> Option<PathBuf> {
    let disk = fs::read_dir(blocks).ok()?.flatten().find(|disk| {
        fs::read_to_string(disk.path().join("serial")).is_ok_and(|found| found.trim_end_matches(['\n', '\0']) == serial)
    })?;
    Some(Path::new("/dev").join(disk.file_name()))
}

/// `<device>/virtio<N>/block/<name>`
fn find_below(device: &Path) -> Option<PathBuf> {
    let virtio = fs::read_dir(device)
        .ok()?
        .flatten()
        .find(|child| child.file_name().as_encoded_bytes().starts_with(b"virtio"))?;
    let disk = fs::read_dir(virtio.path().join("block")).ok()?.flatten().next()?;
    Some(Path::new("/dev").join(disk.file_name()))
}

/// `0000:00:03.0`
fn is_pci_address(address: &str) -> bool {
    address.len() == 12 && address.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_disk_is_found_by_its_serial() {
        let dir = tempfile::tempdir().unwrap();
        for (disk, serial) in [("vda", "root\n"), ("vdb", "layer-1\n")] {
            fs::create_dir(dir.path().join(disk)).unwrap();
            fs::write(dir.path().join(disk).join("serial"), serial).unwrap();
        }
        assert_eq!(find_by_serial(dir.path(), "layer-1").unwrap(), Path::new("/dev/vdb"));
        assert_eq!(find_by_serial(dir.path(), "layer"), None);
    }

    #[test]
    fn a_disk_is_found_below_its_pci_device() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("virtio2/block/vdc")).unwrap();
        assert_eq!(find_below(dir.path()).unwrap(), Path::new("/dev/vdc"));
    }

    #[tokio::test]
    async fn a_disk_without_a_kind_of_name_is_refused() {
        assert!(matches!(disk("/dev/vda").await, Err(Error::Invalid(_))));
        assert!(matches!(disk("pci:../../x").await, Err(Error::Invalid(_))));
    }

    #[tokio::test]
    async fn an_unknown_driver_is_refused_by_name() {
        let storage = Storage { driver: "9p".into(), mount_point: "/x".into(), ..Default::default() };
        let error = add(&storage).await.unwrap_err().to_string();
        assert!(error.starts_with("storage driver \"9p\""), "{error}");
    }

    #[test]
    fn the_layer_that_is_written_to_is_as_the_topmost_below_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (name, mode) in [("top", 0o1751), ("bottom", 0o700)] {
            fs::create_dir(path(name)).unwrap();
            fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let is_root = chown(path("top"), Some(7), Some(8)).is_ok();
        let layers = format!("lowerdir={}:{}", path("top").display(), path("bottom").display());
        let (upper, work) = (path("upper"), path("work"));
        make_layers(&[layers, format!("upperdir={}", upper.display()), format!("workdir={}", work.display())]).unwrap();
        let metadata = fs::metadata(upper).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o1751);
        assert_eq!((metadata.uid(), metadata.gid()) == (7, 8), is_root);
        assert!(work.is_dir());
    }

    #[test]
    fn a_relative_mount_point_is_refused() {
        assert!(remove("run/x").is_err());
        assert!(remove("/").is_err());
    }
}
