//! Whether KVM runs guests on this machine: a launcher tries, and says what came of it.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

const LAUNCHER: &str = "caisson-vmm-qemu";

/// What a launcher would run guests with, and why.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Accelerator {
    /// `kvm` or `tcg`.
    #[serde(rename = "accelerator")]
    pub name: String,
    /// In a few words.
    #[serde(rename = "accelerator_reason")]
    pub reason: String,
}

impl Accelerator {
    /// Asks the launcher among `programs`.
    ///
    /// # Errors
    /// When it has no answer.
    pub fn find(programs: &Path) -> Result<Self> {
        let launcher = programs.join(LAUNCHER);
        let output = Command::new(&launcher).args(["capabilities", "--json"]).output();
        let output = output.with_context(|| format!("execute {}", launcher.display()))?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{LAUNCHER} capabilities: {}", complaint.trim());
        serde_json::from_slice(&output.stdout).with_context(|| format!("understand what {LAUNCHER} tells"))
    }

    /// Whether guests run on the processor itself.
    pub fn is_kvm(&self) -> bool {
        self.name == "kvm"
    }
}
