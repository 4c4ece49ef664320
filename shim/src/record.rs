//! `sandbox.json`: who a sandbox is and which processes serve it, for people's tools and for the clean-up after a shim
//! that was killed.

use std::{fs, io, path::PathBuf};

use caisson_protocol::{paths::SandboxDir, processes::ProcessId};
use serde::{Deserialize, Serialize};

/// The file's content.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Record {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id, which is its first container's.
    pub id: String,
    /// Canonical name of the hypervisor; empty until it is known.
    pub hypervisor: String,
    /// This shim.
    pub shim_pid: u32,
    /// The launcher; 0 until it runs.
    pub launcher_pid: u32,
    /// When the launcher began, in clock ticks since the host's boot: with the pid it names the process for good.
    pub launcher_start_ticks: u64,
    /// The hypervisor; 0 until it runs.
    pub vmm_pid: u32,
    /// Milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Where it has images of its own beside the cache of images, when its root filesystems are disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
}

impl Record {
    /// The launcher's process, as it was when it started.
    pub fn launcher(&self) -> ProcessId {
        ProcessId { pid: self.launcher_pid, start_ticks: self.launcher_start_ticks }
    }

    /// The launcher is process `pid` from now on.
    pub fn set_launcher(&mut self, pid: u32) {
        self.launcher_pid = pid;
        self.launcher_start_ticks = ProcessId::of(pid).map(|process| process.start_ticks).unwrap_or_default();
    }

    /// Writes the file in one step.
    pub fn save(&self, dir: &SandboxDir) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let new = dir.path().join(".sandbox.json.new");
        fs::write(&new, text)?;
        fs::rename(new, dir.record())
    }

    /// Reads the file; `None` when there is none that can be read.
    pub fn load(dir: &SandboxDir) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.record()).ok()?).ok()
    }
}
