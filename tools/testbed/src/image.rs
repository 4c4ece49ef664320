//! Container images from directories: an OCI image layout in a tar file, for `ctr images import`. The same directory
//! always gives the same bytes. No registry, no compression.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    os::unix::fs::MetadataExt,
    path::Path,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// One image: what `docker build` would make from a `FROM scratch`.
#[derive(Debug)]
pub struct Image<'a> {
    /// With registry and tag, as a user writes it after `ctr run`.
    pub name: &'a str,
    /// Its one layer.
    pub rootfs: &'a Path,
    /// `Cmd` of the image configuration.
    pub command: &'a [&'a str],
    /// `User` of the image configuration: `name`, `uid:gid` or empty for root.
    pub user: &'a str,
    /// `WorkingDir` of the image configuration.
    pub working_dir: &'a str,
}

/// Writes `images` into one archive.
///
/// # Errors
/// When a directory cannot be read or the archive cannot be written.
pub fn write_archive(images: &[Image<'_>], archive: &mut File) -> Result<()> {
    let mut blobs = BTreeMap::new();
    let manifests = images.iter().map(|image| add_image(image, &mut blobs)).collect::<Result<Vec<_>>>()?;
    let index = json!({ "schemaVersion": 2, "manifests": manifests });

    let mut tar = Builder::new(archive);
    append_file(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append_file(&mut tar, "index.json", index.to_string().as_bytes())?;
    for (digest, blob) in &blobs {
        append_file(&mut tar, &format!("blobs/sha256/{digest}"), blob)?;
    }
    tar.into_inner().and_then(|file| file.flush()).context("write the image archive")
}

/// Adds the image's blobs and gives its entry in the index.
fn add_image(image: &Image<'_>, blobs: &mut BTreeMap<String, Vec<u8>>) -> Result<Value> {
    let layer = layer(image.rootfs).with_context(|| format!("make a layer of {}", image.rootfs.display()))?;
    let layer = add_blob(blobs, "application/vnd.oci.image.layer.v1.tar", layer);
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "User": image.user,
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": image.command,
            "WorkingDir": image.working_dir,
        },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
        "history": [{ "created": "1970-01-01T00:00:00Z" }],
    });
    let config = add_blob(blobs, "application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
    });
    let mut entry = add_blob(blobs, "application/vnd.oci.image.manifest.v1+json", manifest.to_string().into_bytes());
    entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    entry["annotations"] = json!({ "io.containerd.image.name": image.name });
    Ok(entry)
}

fn add_blob(blobs: &mut BTreeMap<String, Vec<u8>>, media_type: &str, bytes: Vec<u8>) -> Value {
    let digest = hex(&bytes);
    let descriptor = json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len() });
    blobs.insert(digest, bytes);
    descriptor
}

/// A tar of `dir`, entries by name, owners and modes as they are, all times 1970.
fn layer(dir: &Path) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    append_children(&mut tar, dir, Path::new(""))?;
    tar.into_inner().context("finish the layer")
}

fn append_children(tar: &mut Builder<Vec<u8>>, root: &Path, dir: &Path) -> Result<()> {
    let mut names = fs::read_dir(root.join(dir))?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    names.sort();
    for name in names {
        let path = dir.join(name);
        append_entry(tar, root, &path).with_context(|| format!("add {}", path.display()))?;
    }
    Ok(())
}

fn append_entry(tar: &mut Builder<Vec<u8>>, root: &Path, path: &Path) -> Result<()> {
    let source = root.join(path);
    let metadata = fs::symlink_metadata(&source)?;
    let mut header = Header::new_gnu();
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(0);
    header.set_size(0);
    if metadata.is_dir() {
        header.set_entry_type(EntryType::Directory);
        tar.append_data(&mut header, path, &[][..])?;
        append_children(tar, root, path)?;
    } else if metadata.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        tar.append_link(&mut header, path, fs::read_link(&source)?)?;
    } else if metadata.is_file() {
        header.set_size(metadata.len());
        tar.append_data(&mut header, path, File::open(&source)?)?;
    }
    // Device nodes and sockets have no place in these images.
    Ok(())
}

fn append_file(tar: &mut Builder<&mut File>, path: &str, bytes: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, path, bytes).with_context(|| format!("add {path}"))
}

/// SHA-256 in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_directory_gives_the_same_layer_whenever_it_was_written() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(a.path().join("x"), "1").unwrap();
        fs::create_dir(a.path().join("d")).unwrap();
        fs::create_dir(b.path().join("d")).unwrap();
        fs::write(b.path().join("x"), "1").unwrap();
        assert_eq!(layer(a.path()).unwrap(), layer(b.path()).unwrap());
    }

    #[test]
    fn a_layer_keeps_symbolic_links_and_modes() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("busybox", dir.path().join("sh")).unwrap();
        let layer = layer(dir.path()).unwrap();
        let mut archive = tar::Archive::new(&layer[..]);
        let entry = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(entry.link_name().unwrap().unwrap(), Path::new("busybox"));
    }
}
