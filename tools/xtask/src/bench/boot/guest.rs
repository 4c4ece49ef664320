//! What is booted: a kernel, and an initrd whose first process says that it is there and then waits.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_testbed::Installation;

use super::Options;

/// What the first process says.
pub const SIGN: &str = "first process started";
/// The kernel's command line, for every hypervisor.
pub const PARAMETERS: &str = "console=ttyS0 quiet panic=-1";
const BUSYBOX: &str = "/bin/busybox";

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
        let whose = if options.debian_kernel { &installation.debian_guest } else { &installation.guest };
        Ok(Self {
            vmlinux: whose.kernel.clone(),
            bz_image: whose.kernel.with_file_name("bzImage"),
            initrd: make_initrd(folder)?,
            memory_mib: options.memory_mib,
        })
    }
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
