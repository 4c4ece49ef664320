//! The images that a container's disks show: one of each layer, and one to write to.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use caisson_protocol::containerd::api::Mount;
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;

use crate::{
    Error, Result,
    block::{
        image_cache::{Image, ImageCache},
        tool,
    },
    mount::{mount_at, unmount_below},
};

/// Changes with how images are made: one of another making is not taken for one of ours.
const MAKING: &str = "erofs 1";
/// Bytes of a digest in an image's name.
pub const NAME_BYTES: usize = 16;

/// The cached image of what `directories`, the topmost first, show as one. They never change. Several are mounted over
/// one another on `scratch`, which belongs to the caller.
pub async fn of_layers(cache: &ImageCache, directories: &[PathBuf], scratch: &Path) -> Result<Arc<Image>> {
    let name = format!("{}.erofs", digest(directories)?);
    let make = |image| async move {
        match directories {
            [directory] => make_erofs(directory, image).await,
            several => {
                let merged = Merged::mount(several, scratch).await?;
                make_erofs(&merged.0, image).await
            }
        }
    };
    cache.get(&name, make).await
}

/// Makes an EROFS image of `directory`: whiteouts and the attributes by which overlayfs tells opaque directories are
/// files and attributes like all others.
pub async fn make_erofs(directory: &Path, image: PathBuf) -> Result<()> {
    let action = format!("make an image of the layer {}", directory.display());
    // Its messages on standard output would be thousands.
    let arguments = [OsStr::new("-d1"), OsStr::new("--quiet"), image.as_os_str(), directory.as_os_str()];
    tool::run(&action, "mkfs.erofs", "erofs-utils", &arguments).await
}

/// Makes a disk of `size_mib` at `disk` that holds an empty ext4 file system and takes only as much room as is written.
pub async fn make_writable(cache: &ImageCache, size_mib: u64, disk: &Path) -> Result<()> {
    let template = cache.get(&format!("writable-{size_mib}.ext4"), |image| make_ext4(size_mib, image)).await?;
    let action = format!("make the disk {}", disk.display());
    // Shares the template's blocks where the file system can, and else copies those that are not empty.
    let arguments = ["--reflink=auto", "--sparse=always", "--"].map(OsStr::new);
    let arguments = [&arguments[..], &[template.path.as_os_str(), disk.as_os_str()]].concat();
    tool::run(&action, "cp", "coreutils", &arguments).await
}

async fn make_ext4(size_mib: u64, image: PathBuf) -> Result<()> {
    let action = format!("make an ext4 file system of {size_mib} MiB");
    let file = File::create(&image);
    file.and_then(|file| file.set_len(size_mib << 20)).map_err(Error::host(action.as_str()))?;
    // Nobody mounts it again after a crash, so that it needs no journal, and nobody needs room that only root may use.
    let arguments = ["-q", "-F", "-m0", "-O^has_journal", "-Elazy_itable_init=1,nodiscard"].map(OsStr::new);
    let arguments = [&arguments[..], &[image.as_os_str()]].concat();
    tool::run(&action, "mkfs.ext4", "e2fsprogs", &arguments).await
}

/// Names the content of directories that never change once they are layers. A path alone does not: containerd gives it
/// away again. The directory's number and the times of its making and of its last change cannot be set, and differ.
fn digest(directories: &[PathBuf]) -> Result<String> {
    let mut digest = Sha256::new();
    digest.update(MAKING);
    for directory in directories {
        let identity =
            identity(directory).map_err(Error::host(format!("look at the layer {}", directory.display())))?;
        digest.update(directory.as_os_str().as_bytes());
        digest.update(format!("\0{identity}\0"));
    }
    Ok(digest.finalize().iter().take(NAME_BYTES).map(|byte| format!("{byte:02x}")).collect())
}

fn identity(directory: &Path) -> io::Result<String> {
    let metadata = fs::metadata(directory)?;
    if !metadata.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    // Not every file system knows it; the other two are then left.
    let born = metadata.created().unwrap_or(UNIX_EPOCH).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(format!("{} {} {}.{}", metadata.ino(), born.as_nanos(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Layers as one directory; unmounted with the value.
struct Merged(PathBuf);

impl Merged {
    async fn mount(layers: &[PathBuf], target: &Path) -> Result<Self> {
        let lower: Vec<_> = layers.iter().map(|layer| layer.to_string_lossy()).collect();
        let overlay = Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec!["ro".into(), format!("lowerdir={}", lower.join(":"))],
            ..Default::default()
        };
        let action = format!("lay {} layers over one another on {}", layers.len(), target.display());
        let target = target.to_owned();
        let mounted = spawn_blocking(move || {
            fs::create_dir_all(&target)?;
            mount_at(&overlay, &target)?;
            Ok(Self(target))
        });
        mounted.await.unwrap_or_else(|error| Err(error.into())).map_err(Error::host(action))
    }
}

impl Drop for Merged {
    fn drop(&mut self) {
        if let Err(error) = unmount_below(&self.0).and_then(|()| fs::remove_dir(&self.0)) {
            tracing::warn!(directory = %self.0.display(), %error, "layers stay mounted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(directory: &Path) -> String {
        digest(&[directory.to_owned()]).unwrap()
    }

    #[test]
    fn a_layer_that_did_not_change_keeps_its_name() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(dir.path()), of(dir.path()));
    }

    #[test]
    fn a_path_that_was_given_away_again_is_another_layer() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("7/fs");
        fs::create_dir_all(&layer).unwrap();
        let first = of(&layer);
        fs::remove_dir(&layer).unwrap();
        fs::create_dir(&layer).unwrap();
        assert_ne!(of(&layer), first);
    }

    #[test]
    fn a_layer_whose_directory_changed_is_another_layer() {
        let dir = tempfile::tempdir().unwrap();
        let first = of(dir.path());
        fs::write(dir.path().join("file"), "").unwrap();
        assert_ne!(of(dir.path()), first);
    }

    #[test]
    fn the_same_layers_in_another_order_are_another_image() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (a, b) = (a.path().to_owned(), b.path().to_owned());
        assert_ne!(digest(&[a.clone(), b.clone()]).unwrap(), digest(&[b, a]).unwrap());
    }

    #[test]
    fn a_layer_that_is_missing_is_named() {
        let error = digest(&["/nonexistent/layer".into()]).unwrap_err();
        assert_eq!(error.to_string(), "look at the layer /nonexistent/layer");
    }

    #[tokio::test]
    async fn a_layer_becomes_an_image_in_the_cache() {
        let (layer, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(layer.path().join("hello"), "from the layer").unwrap();
        let images = ImageCache::new(cache.path().into(), 1 << 30);
        let image = of_layers(&images, &[layer.path().into()], Path::new("/nowhere")).await.unwrap();
        // The magic number of EROFS, fs/erofs/erofs_fs.h.
        assert_eq!(fs::read(&image.path).unwrap()[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
    }

    #[tokio::test]
    async fn a_writable_disk_has_its_size_and_takes_little_room() {
        let cache = tempfile::tempdir().unwrap();
        let (images, disk) = (ImageCache::new(cache.path().into(), 1 << 30), cache.path().join("disk"));
        make_writable(&images, 512, &disk).await.unwrap();
        let metadata = fs::metadata(&disk).unwrap();
        assert_eq!(metadata.len(), 512 << 20);
        assert!(metadata.blocks() * 512 < 16 << 20, "{} blocks", metadata.blocks());
    }
}
