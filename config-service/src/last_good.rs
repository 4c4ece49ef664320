//! The last good state of each configuration, kept in files so that it outlives this process.
//!
//! What is kept is the text of the configuration's files: read again, it comes to the same configuration or, where what
//! it names is gone, to none.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{atomic, load::Layer};

/// Where they are kept.
#[derive(Clone, Debug)]
pub(crate) struct LastGood {
    dir: PathBuf,
}

/// One of them.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Kept {
    /// The configuration, symlinks resolved.
    pub(crate) file: PathBuf,
    /// It and its drop-ins.
    pub(crate) layers: Vec<Layer>,
}

impl LastGood {
    /// In `dir`, which is made when it is needed.
    pub(crate) fn in_dir(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Keeps the state of `requested` in place of an older one, all or nothing.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub(crate) fn keep(&self, requested: Option<&Path>, kept: &Kept) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        atomic::write(&self.path(requested), &serde_json::to_vec(kept)?)
    }

    /// What was kept of `requested`; none when there is nothing that can be read.
    pub(crate) fn find(&self, requested: Option<&Path>) -> Option<Kept> {
        serde_json::from_slice(&fs::read(self.path(requested)).ok()?).ok()
    }

    fn path(&self, requested: Option<&Path>) -> PathBuf {
        let digest = Sha256::digest(requested.unwrap_or(Path::new("")).as_os_str().as_encoded_bytes());
        let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        self.dir.join(format!("{name}.json"))
    }
}
