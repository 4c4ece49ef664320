//! Where the parts of caisson are that `cargo xtask setup` has built.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::Archives;

/// Everything that a private containerd needs. Written by the set-up, read by tests; all paths are absolute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Installation {
    /// `containerd-shim-caisson-v2` and the programs that it finds by name.
    pub programs: PathBuf,
    /// The hypervisor.
    pub qemu: PathBuf,
    /// With image-builder's own kernel: an ELF file, and the same as `bzImage` beside it.
    pub guest: Guest,
    /// With Debian's kernel as it is, for the same hypervisors.
    pub debian_guest: Guest,
    /// Shares host directories with the guest.
    pub virtiofsd: PathBuf,
    /// Container images.
    pub archives: Archives,
}

/// What a virtual machine boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its root file system: the agent, and the kernel's modules if it has any.
    pub initrd: PathBuf,
}

impl Guest {
    /// What image-builder has left in `folder`.
    pub fn in_folder(folder: &Path) -> Self {
        Self { kernel: folder.join("vmlinux"), initrd: folder.join("initrd.img") }
    }
}

impl Installation {
    /// What the last set-up has left.
    ///
    /// # Errors
    /// When there was none.
    pub fn find() -> Result<Self> {
        let record = Self::record()?;
        let text = fs::read_to_string(&record)
            .with_context(|| format!("read {}: run `cargo xtask setup` first", record.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is from another version: run `cargo xtask setup` again", record.display()))
    }

    /// Leaves this for [`Self::find`].
    ///
    /// # Errors
    /// When the target directory cannot be written.
    pub fn save(&self) -> Result<()> {
        let record = Self::record()?;
        let text = serde_json::to_string_pretty(self).context("write the installation as JSON")?;
        fs::write(&record, text).with_context(|| format!("write {}", record.display()))
    }

    /// The folder of the running program's build, `target/release`: the other programs are beside it.
    ///
    /// # Errors
    /// When the running program is not in a cargo target directory.
    pub fn build_dir() -> Result<PathBuf> {
        let program = env::current_exe().context("find the running program")?;
        let dir = program.parent().context("the running program is in no folder")?;
        Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir }.to_owned())
    }

    /// The checkout.
    pub fn workspace() -> &'static Path {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        here.ancestors().nth(2).unwrap_or(here)
    }

    fn record() -> Result<PathBuf> {
        Ok(Self::build_dir()?.join("installation.json"))
    }
}
