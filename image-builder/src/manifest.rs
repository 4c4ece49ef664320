//! `manifest.json`: from what, with what and how each artifact was made, and what came out.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest;
use crate::error::{Error, Result};
use crate::verity::Verity;

/// Raised when the same inputs make other bytes than before, so that old cache entries are left alone.
const BUILDER_VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "-1");

/// The manifest of an output directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The kernel, when one was built into this directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Section>,
    /// The initrd, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Section>,
    /// The root filesystem, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rootfs: Option<Section>,
}

/// One build step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// What went in: packages, the agent, other artifacts.
    pub inputs: Vec<Input>,
    /// Choices that change the result.
    pub options: BTreeMap<String, String>,
    /// Programs whose version changes the result.
    pub tools: BTreeMap<String, String>,
    /// What was found on the way: kernel release, installed packages.
    pub facts: BTreeMap<String, String>,
    /// How to verify the image, when it has a dm-verity hash tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verity: Option<Verity>,
    /// What came out.
    pub outputs: Vec<Artifact>,
}

/// One input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Package or file name.
    pub name: String,
    /// Version, of a package.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Digest of its bytes.
    pub sha256: String,
}

/// One output file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// File name.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Digest of its bytes.
    pub sha256: String,
}

impl Artifact {
    /// Size and digest of a file.
    pub fn describe(path: &Path) -> Result<Self> {
        let size = std::fs::metadata(path).map_err(Error::file("read", path))?.len();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, size, sha256: digest::of_file(path)? })
    }
}

impl Section {
    /// Adds an input.
    pub fn input(mut self, name: &str, version: Option<&str>, sha256: &str) -> Self {
        let version = version.map(str::to_owned);
        self.inputs.push(Input { name: name.to_owned(), version, sha256: sha256.to_owned() });
        self
    }

    /// Adds a choice.
    pub fn option(mut self, name: &str, value: impl Into<String>) -> Self {
        self.options.insert(name.to_owned(), value.into());
        self
    }

    /// Adds a program's version.
    pub fn tool(mut self, name: &str, version: impl Into<String>) -> Self {
        self.tools.insert(name.to_owned(), version.into());
        self
    }

    /// Notes what was found on the way.
    pub fn note(&mut self, name: &str, value: impl Into<String>) {
        self.facts.insert(name.to_owned(), value.into());
    }

    /// Digest of everything that determines the result.
    pub fn key(&self, kind: &str) -> String {
        let inputs = (BUILDER_VERSION, kind, &self.inputs, &self.options, &self.tools);
        digest::of_bytes(serde_json::to_string(&inputs).unwrap_or_default().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_with_every_kind_of_input() {
        let base =
            || Section::default().input("linux", Some("6.1"), "aa").option("modules", "virtio").tool("xz", "5.4");
        let keys = [
            base().key("kernel"),
            base().key("initrd"),
            base().input("more", None, "bb").key("kernel"),
            base().option("modules", "fuse").key("kernel"),
            base().tool("xz", "5.6").key("kernel"),
        ];
        let distinct: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(base().key("kernel"), keys[0]);
    }

    #[test]
    fn the_key_ignores_what_is_only_found_on_the_way() {
        let mut section = Section::default();
        let before = section.key("kernel");
        section.note("release", "6.1.0");
        assert_eq!(section.key("kernel"), before);
    }
}
