//! A program that ends with the value that stands for it, and with this program, however that ends.

use std::process::{Child, Command};

use anyhow::{Context, Result};

/// Its end.
#[derive(Debug)]
pub struct ChildGuard(Child);

impl ChildGuard {
    /// A command that executes `program`.
    pub fn command(program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", program]);
        command
    }

    /// Starts it.
    pub fn spawn(mut command: Command) -> Result<Self> {
        command.spawn().map(Self).context("execute setpriv (of util-linux)")
    }
}

impl Drop for ChildGuard {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
