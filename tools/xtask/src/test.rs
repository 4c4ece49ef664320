//! `cargo xtask test`: what must pass before a change is taken.

use std::process::Command;

use anyhow::Result;
use caisson_testbed::{Cache, Installation};

use crate::{
    build::{self, cargo},
    kvm_tests,
    step::{run, step},
};

/// Formatting, lints, and every test of the workspace, end to end included, with and without KVM. `arguments` go to
/// nextest; tests that are chosen so are run on this machine only.
pub fn test(installation: &Installation, arguments: &[String]) -> Result<()> {
    step("cargo fmt --check", || run(cargo().args(["fmt", "--all", "--check"])))?;
    step("cargo clippy", || {
        let mut clippy = cargo();
        clippy.args(["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"]);
        // Tests unwind, whatever programs do; so nothing is checked twice.
        run(clippy.env("CARGO_PROFILE_RELEASE_PANIC", "unwind"))
    })?;
    let nextest = step("find cargo-nextest", || build::nextest(&Cache::open()?))?;
    let mut tests = Command::new(nextest);
    tests.args(["nextest", "run", "--release", "--workspace"]).args(arguments).current_dir(Installation::workspace());
    step("cargo nextest run", || run(&mut tests))?;
    if arguments.is_empty() { kvm_tests::test(installation, &[]) } else { Ok(()) }
}
