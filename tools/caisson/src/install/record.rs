//! What an installation has put where, so that the next one and `uninstall` know their own files.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::files::{self, Artifact, Content, Destination, Outcome, Placed};

/// The file's content.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(super) struct Record {
    pub(super) files: Vec<Recorded>,
    /// containerd's configuration, when the runtimes were registered there.
    pub(super) containerd_config: Option<PathBuf>,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Recorded {
    pub(super) path: PathBuf,
    /// Of what was installed, which somebody may have changed since.
    pub(super) sha256: String,
    pub(super) is_program: bool,
}

impl Record {
    /// Empty when nothing is installed.
    pub(super) fn load(destination: &Destination, prefix: &Path) -> anyhow::Result<Self> {
        let path = destination.resolve(&Self::path(prefix));
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("read {}", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    /// All that is installed now; not what somebody has put in its place.
    pub(super) fn of(artifacts: &[Artifact], placed: &[Placed], containerd_config: Option<PathBuf>) -> Self {
        let own = artifacts.iter().zip(placed).filter(|(_, placed)| placed.outcome != Outcome::Kept);
        let files = own.filter_map(|(artifact, _)| {
            let is_program = matches!(artifact.content, Content::Program(_));
            Some(Recorded { path: artifact.path.clone(), sha256: artifact.content.digest().ok()?, is_program })
        });
        Self { files: files.collect(), containerd_config }
    }

    pub(super) fn save(&self, destination: &Destination, prefix: &Path) -> anyhow::Result<()> {
        if destination.is_dry_run() {
            return Ok(());
        }
        let path = destination.resolve(&Self::path(prefix));
        let text = serde_json::to_string_pretty(self)?;
        files::replace(&path, &text, 0o644).with_context(|| format!("write {}", path.display()))
    }

    /// What was installed at `path`.
    pub(super) fn digest_of(&self, path: &Path) -> Option<&str> {
        self.files.iter().find(|file| file.path == path).map(|file| file.sha256.as_str())
    }

    pub(super) fn path(prefix: &Path) -> PathBuf {
        prefix.join("share/caisson/installed.json")
    }
}
