//! `cargo xtask setup`: from a fresh Debian 12 machine to one where a pod boots.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result};
use caisson_testbed::{Archives, Cache, Guest, Installation};

use crate::{
    build, packages,
    step::{run, step},
};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// A kernel with everything built in that a guest needs, and nothing else: it boots in half the time of Debian's.
const OWN_KERNEL: &str = "[kernel]\nflavour = \"debian-source\"\n";
const DEBIAN_KERNEL: &str = "[kernel]\nflavour = \"debian-binary\"\n";

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
    let guest = step("build the guest's kernel and root file system", || {
        build_guest(OWN_KERNEL, &programs, &agent, &programs.join("guest"))
    })?;
    let debian_guest = step("the same with Debian's kernel", || {
        build_guest(DEBIAN_KERNEL, &programs, &agent, &programs.join("guest-debian"))
    })?;
    let installation = Installation { qemu: QEMU.into(), guest, debian_guest, programs, virtiofsd, archives };
    installation.save()?;
    Ok(installation)
}

/// image-builder has a cache of its own: the second time is quick.
fn build_guest(recipe: &str, programs: &Path, agent: &Path, output: &Path) -> Result<Guest> {
    fs::create_dir_all(output).with_context(|| format!("make {}", output.display()))?;
    let manifest = output.join("recipe.toml");
    fs::write(&manifest, recipe).with_context(|| format!("write {}", manifest.display()))?;
    let mut builder = Command::new(programs.join("image-builder"));
    builder.args(["build", "all", "--agent"]).arg(agent).arg("--manifest").arg(manifest).arg("--output").arg(output);
    run(&mut builder)?;
    Ok(Guest::in_folder(output))
}
