//! What a `caisson-vmm-<name>` tells of itself and of its hypervisor.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use caisson_protocol::config::SandboxConfig;
use serde::{Deserialize, Serialize};

use crate::program;

/// What launchers' names begin with.
const PREFIX: &str = "caisson-vmm-";

/// The answer to `capabilities --json`, in the words of `protocol/proto/vmm.proto`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Capabilities {
    pub(crate) version: String,
    pub(crate) accelerator: String,
    pub(crate) accelerator_reason: String,
    pub(crate) devices: Vec<String>,
    pub(crate) hotplug: Vec<String>,
    pub(crate) operations: Vec<String>,
    #[serde(default)]
    pub(crate) features: Vec<String>,
    #[serde(default)]
    pub(crate) confidential: Vec<String>,
    /// Why something cannot be done.
    #[serde(default)]
    pub(crate) missing: BTreeMap<String, String>,
    /// The hypervisor's program; empty where that is the launcher itself.
    #[serde(default)]
    pub(crate) hypervisor_path: String,
}

impl Capabilities {
    /// The hypervisor's program, of which `launcher` told.
    pub(crate) fn program(&self, launcher: &Path) -> PathBuf {
        if self.hypervisor_path.is_empty() { launcher.to_owned() } else { self.hypervisor_path.clone().into() }
    }
}

/// The launcher of `hypervisor` in the first of `dirs` that has it.
pub(crate) fn find(dirs: &[PathBuf], hypervisor: &str) -> Option<PathBuf> {
    program::find(dirs, &format!("{PREFIX}{hypervisor}"))
}

/// The names of all hypervisors that have a launcher in `dirs`.
pub(crate) fn installed(dirs: &[PathBuf]) -> BTreeSet<String> {
    let entries = dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    let programs = entries.filter(|entry| program::is_program(&entry.path()));
    programs.filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix(PREFIX)?.to_owned())).collect()
}

/// What the hypervisor that `launcher` is for can do here as `config` has it: with its program and its options. Without
/// one it is as the launcher chooses.
pub(crate) async fn capabilities(launcher: &Path, config: Option<&SandboxConfig>) -> anyhow::Result<Capabilities> {
    let mut arguments = vec!["capabilities", "--json"];
    if let Some(config) = config {
        arguments.extend(["--hypervisor", &config.vm.hypervisor_path, "--options", &config.options]);
    }
    answer(launcher, &arguments).await
}

/// The hypervisor's own option keys.
pub(crate) async fn options(launcher: &Path) -> anyhow::Result<serde_json::Value> {
    answer(launcher, &["options"]).await
}

async fn answer<T: for<'a> Deserialize<'a>>(launcher: &Path, arguments: &[&str]) -> anyhow::Result<T> {
    let said = program::ask(launcher, arguments).await?;
    serde_json::from_str(&said).with_context(|| format!("understand {} {}", launcher.display(), arguments.join(" ")))
}
