//! What the test host boots from: image-builder makes it, and keeps it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use caisson_testbed::Installation;

use crate::{build, step::run_quietly};

/// Its kernel's modules, and its flavour; the last table is `[rootfs]`.
const RECIPE: &str = include_str!("../../../test-host/recipe.toml");

/// The files of one Debian release's test host.
#[derive(Clone, Debug)]
pub struct Image {
    /// An ELF file.
    pub kernel: PathBuf,
    /// The first process and the kernel's modules.
    pub initrd: PathBuf,
    /// Debian, as EROFS.
    pub system: PathBuf,
}

impl Image {
    /// The release that is taken unless told.
    pub const SUITE: &str = "bookworm";
    /// The releases that can be had.
    pub const SUITES: [&str; 3] = [Self::SUITE, "trixie", "sid"];

    /// Builds what has changed.
    pub fn build(suite: &str) -> Result<Self> {
        let init = build::test_host_init()?;
        let programs = Installation::build_dir()?;
        let folder = programs.join("test-host").join(suite);
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let recipe = folder.join("recipe.toml");
        fs::write(&recipe, format!("{RECIPE}suite = \"{suite}\"\n")).context("write the test host's recipe")?;
        let mut builder = Command::new(programs.join("image-builder"));
        builder.args(["build", "all", "--agent"]).arg(init).arg("--manifest").arg(recipe).arg("--output").arg(&folder);
        run_quietly(&mut builder)?;
        Ok(Self::in_folder(&folder))
    }

    fn in_folder(folder: &Path) -> Self {
        Self { kernel: folder.join("vmlinux"), initrd: folder.join("initrd.img"), system: folder.join("rootfs.erofs") }
    }
}
