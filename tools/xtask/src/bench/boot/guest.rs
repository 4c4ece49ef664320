//! What is booted: a kernel, and an initrd whose first process says that it is there and then waits.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_testbed::Installation;

use super::Options;
use crate::step::{run, step};

/// What the first process says.
pub const SIGN: &str = "first process started";
/// The kernel's command line, for every hypervisor.
pub const PARAMETERS: &str = "console=ttyS0 quiet panic=-1";
const BUSYBOX: &str = "/bin/busybox";
const RECIPE: &str = "[kernel]\nflavour = \"debian-source\"\n";

/// The guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// An ELF file.
    pub vmlinux: PathBuf,
    /// The same kernel, compressed.
    pub bz_image: PathBuf,
    /// The first process.
    pub initrd: PathBuf,
    /// In MiB.
    pub memory_mib: u64,
}

impl Guest {
    /// Makes the initrd in `folder`.
    pub fn make(installation: &Installation, folder: &Path, options: &Options) -> Result<Self> {
        let small = small_kernel_folder(installation);
        let own = installation.kernel.parent().context("the guest's kernel is in no folder")?;
        let kernels = if options.small_kernel { &small } else { own };
        Ok(Self {
            vmlinux: kernels.join("vmlinux"),
            bz_image: kernels.join("bzImage"),
            initrd: make_initrd(folder)?,
            memory_mib: options.memory_mib,
        })
    }
}

/// image-builder keeps it: the second time is quick.
pub fn build_small_kernel(installation: &Installation) -> Result<()> {
    let output = small_kernel_folder(installation);
    fs::create_dir_all(&output).with_context(|| format!("make {}", output.display()))?;
    let recipe = output.join("recipe.toml");
    fs::write(&recipe, RECIPE).context("write the kernel's recipe")?;
    let mut builder = Command::new(installation.programs.join("image-builder"));
    builder.args(["build", "kernel", "--manifest"]).arg(recipe).arg("--output").arg(&output);
    step("build the small kernel", || run(&mut builder))
}

fn small_kernel_folder(installation: &Installation) -> PathBuf {
    installation.programs.join("small-kernel")
}

fn make_initrd(folder: &Path) -> Result<PathBuf> {
    let root = folder.join("root");
    fs::create_dir_all(root.join("bin")).context("make the initrd's root")?;
    fs::copy(BUSYBOX, root.join("bin/busybox")).context("copy busybox (of busybox-static)")?;
    let init = root.join("init");
    fs::write(&init, format!("#!/bin/busybox sh\necho {SIGN}\nexec /bin/busybox sleep 1000000\n"))?;
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let archive = folder.join("initrd.img");
    let pack = format!("cd '{}' && find . | {BUSYBOX} cpio -o -H newc > '{}'", root.display(), archive.display());
    let output = Command::new("sh").args(["-c", &pack]).output().context("execute sh")?;
    ensure!(output.status.success(), "busybox cpio: {}", String::from_utf8_lossy(&output.stderr));
    Ok(archive)
}
