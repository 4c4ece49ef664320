//! Which Cloud Hypervisor it is.

use std::{path::Path, process::Stdio, time::Duration};

use caisson_vmm_launcher::{Error, Result};
use tokio::{process::Command, time::timeout};

const DEADLINE: Duration = Duration::from_secs(10);

/// What the executable at `path` says: `v53.0`.
///
/// # Errors
/// When it cannot be executed or is something else.
pub async fn of(path: &Path) -> Result<String> {
    let run = Command::new(path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(DEADLINE, run)
        .await
        .map_err(|_| Error::Hypervisor(format!("{} --version does not end", path.display())))?
        .map_err(Error::host(format!("execute {}", path.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next().and_then(|line| line.strip_prefix("cloud-hypervisor ")) {
        Some(version) => Ok(version.trim().trim_start_matches('v').to_owned()),
        None => Err(Error::Invalid(format!("{} is not Cloud Hypervisor: --version does not say so", path.display()))),
    }
}
