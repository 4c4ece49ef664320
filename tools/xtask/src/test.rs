//! `cargo xtask test`: what must pass before a change is taken.

use std::{env, ffi::OsString};

use anyhow::Result;
use caisson_testbed::Cache;

use crate::{
    build::{self, cargo},
    step::{run, step},
};

/// Formatting, lints, and every test of the workspace, end to end included. `arguments` go to nextest.
pub fn test(arguments: &[String]) -> Result<()> {
    step("cargo fmt --check", || run(cargo().args(["fmt", "--all", "--check"])))?;
    step("cargo clippy", || {
        run(cargo().args(["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    })?;
    let nextest = step("find cargo-nextest", || build::nextest(&Cache::open()?))?;
    let mut tests = cargo();
    if let Some(dir) = nextest {
        tests.env("PATH", prepend(dir.into_os_string()));
    }
    tests.args(["nextest", "run", "--release", "--workspace"]).args(arguments);
    step("cargo nextest run", || run(&mut tests))
}

fn prepend(mut dir: OsString) -> OsString {
    dir.push(":");
    dir.push(env::var_os("PATH").unwrap_or_default());
    dir
}
