//! `cargo xtask setup`: from a fresh Debian 12 machine to one where a pod boots.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use caisson_testbed::{Archives, Cache, Installation};

use crate::{
    build, packages,
    step::{run, step},
};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Does what has not been done yet.
pub fn set_up() -> Result<Installation> {
    packages::check_machine()?;
    packages::install()?;
    let cache = step("open the cache ($CAISSON_CACHE)", Cache::open)?;
    let virtiofsd = step("build virtiofsd", || build::virtiofsd(&cache))?;
    let archives = step("make container images", || Archives::make(&cache))?;
    step("build caisson", build::programs)?;
    let agent = step("build the guest's agent", build::agent)?;
    let programs = Installation::build_dir()?;
    let guest = step("build the guest's kernel and root file system", || build_guest(&programs, &agent))?;
    let installation = Installation {
        qemu: QEMU.into(),
        kernel: guest.join("vmlinux"),
        initrd: guest.join("initrd.img"),
        programs,
        virtiofsd,
        archives,
    };
    installation.save()?;
    Ok(installation)
}

/// image-builder has a cache of its own: the second time is quick.
fn build_guest(programs: &Path, agent: &Path) -> Result<PathBuf> {
    let output = programs.join("guest");
    let mut builder = Command::new(programs.join("image-builder"));
    builder.args(["build", "all", "--agent"]).arg(agent).arg("--output").arg(&output);
    run(&mut builder)?;
    Ok(output)
}
