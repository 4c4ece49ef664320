//! Builds what the workspace and crates.io provide. cargo knows what is up to date.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};
use caisson_testbed::{Cache, Installation};

use crate::step::run;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Where Debian keeps libseccomp.a.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
const VIRTIOFSD: &str = "virtiofsd@1.14.0";
const NEXTEST: &str = "cargo-nextest@0.9.143";

/// `cargo`, the one that runs this, in the checkout.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(Installation::workspace());
    command
}

/// The shim and the programs that it finds by name. First processes are another build.
pub fn programs() -> Result<()> {
    let others = ["--exclude=caisson-agent", "--exclude=caisson-test-host", "--exclude=xtask"];
    run(cargo().args(["build", "--release", "--bins", "--workspace"]).args(others))
}

/// The guest's first process.
pub fn agent() -> Result<PathBuf> {
    first_process("caisson-agent")
}

/// The test host's first process.
pub fn test_host_init() -> Result<PathBuf> {
    first_process("caisson-test-host")
}

/// A program that needs nothing else in its initrd: static and small.
fn first_process(package: &str) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--profile=guest", "--target", TARGET, "--bins", "--package", package]);
    build.env("RUSTFLAGS", "-C target-feature=+crt-static");
    build.env("LIBSECCOMP_LINK_TYPE", "static").env("LIBSECCOMP_LIB_PATH", LIBRARIES);
    run(&mut build)?;
    let program = target_dir()?.join(TARGET).join("guest").join(package);
    ensure!(program.exists(), "cargo built no {}", program.display());
    Ok(program)
}

/// virtiofsd, which Debian 12 does not have.
pub fn virtiofsd(cache: &Cache) -> Result<PathBuf> {
    install(cache, VIRTIOFSD, &[]).map(|root| root.join("bin/virtiofsd"))
}

/// `cargo-nextest`, unless cargo has it already: built without optimisation, which takes a third of the time, and
/// without the part that updates itself.
pub fn nextest(cache: &Cache) -> Result<PathBuf> {
    const PROGRAM: &str = "cargo-nextest";
    let path = env::var_os("PATH").unwrap_or_default();
    if let Some(found) = env::split_paths(&path).map(|folder| folder.join(PROGRAM)).find(|program| program.exists()) {
        return Ok(found);
    }
    let options = ["--debug", "--no-default-features", "--features=default-no-update"];
    install(cache, NEXTEST, &options).map(|root| root.join("bin").join(PROGRAM))
}

fn install(cache: &Cache, what: &str, options: &[&str]) -> Result<PathBuf> {
    let name = what.replace('@', "-");
    cache.get(&name, &[what.as_bytes(), options.concat().as_bytes()], |root| {
        let mut install = cargo();
        install.args(["install", "--locked", "--no-track", what]).args(options).arg("--root").arg(root);
        // What is built for the machine is of no use to the workspace's target directory, and the other way round.
        run(install.env("CARGO_TARGET_DIR", root.with_extension("target")))
    })
}

/// `target/`
fn target_dir() -> Result<PathBuf> {
    let build_dir = Installation::build_dir()?;
    Ok(build_dir.parent().unwrap_or(Path::new("target")).to_owned())
}
