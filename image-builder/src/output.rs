//! The output directory: artifacts under stable names, each replaced in one step, and `manifest.json`.
//!
//! A VM that has an old artifact open or mapped keeps it. An artifact that is there already is left untouched.

use std::fs;
use std::io;
use std::path::Path;

use crate::cache::{Entry, lock};
use crate::digest;
use crate::error::{Error, Result};
use crate::manifest::{Artifact, Manifest, Section};

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";

/// Held while an output directory is written.
const LOCK: &str = ".image-builder.lock";

/// An entry, its section of the manifest, and which of its files are published.
pub type Published<'a> = (&'a Entry, fn(&mut Manifest) -> &mut Option<Section>, fn(&str) -> bool);

/// Copies the entries' published artifacts, and brings the manifest up to date; other sections of it are kept.
pub fn publish(directory: &Path, entries: &[Published]) -> Result<Manifest> {
    fs::create_dir_all(directory).map_err(Error::file("create", directory))?;
    let _lock = lock(&directory.join(LOCK))?;
    let path = directory.join(MANIFEST);
    let mut manifest = read(&path)?;
    for (entry, slot, is_published) in entries {
        let mut section = entry.section.clone();
        section.outputs.retain(|artifact| is_published(&artifact.name));
        for artifact in &section.outputs {
            copy(entry, artifact, directory)?;
        }
        *slot(&mut manifest) = Some(section);
    }
    let text = serde_json::to_string_pretty(&manifest).unwrap_or_default() + "\n";
    replace(directory, &path, |temporary| fs::write(temporary, &text))?;
    Ok(manifest)
}

/// The manifest that is there; one that cannot be understood is made anew.
fn read(path: &Path) -> Result<Manifest> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Manifest::default()),
        Err(error) => Err(Error::file("read", path)(error)),
    }
}

fn copy(entry: &Entry, artifact: &Artifact, directory: &Path) -> Result<()> {
    let target = directory.join(&artifact.name);
    let same_size = fs::metadata(&target).is_ok_and(|metadata| metadata.len() == artifact.size);
    if same_size && digest::of_file(&target)? == artifact.sha256 {
        return Ok(());
    }
    replace(directory, &target, |temporary| fs::copy(entry.path(&artifact.name), temporary).map(drop))
}

fn replace(directory: &Path, target: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    let temporary = tempfile::Builder::new()
        .prefix(".new-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(directory)
        .map_err(Error::file("create a file in", directory))?;
    write(temporary.path()).map_err(Error::file("write", target))?;
    temporary.persist(target).map_err(|error| Error::file("write", target)(error.error))?;
    Ok(())
}
