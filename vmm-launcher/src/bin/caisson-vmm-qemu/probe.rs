//! What an installed QEMU is and has: asked of itself, on a machine without anything.

use std::{path::Path, process::Stdio, time::Duration};

use caisson_vmm_launcher::{Error, Result, process::Process, qmp::Qmp};
use serde_json::json;
use std::os::fd::AsRawFd;
use tokio::{process::Command, time::timeout};

const DEADLINE: Duration = Duration::from_secs(10);

/// An installed QEMU.
#[derive(Clone, Debug)]
pub struct Installed {
    /// As it says it.
    pub version: String,
    /// The devices that it was built with.
    devices: Vec<String>,
}

impl Installed {
    /// The QEMU at `path`.
    ///
    /// # Errors
    /// When it is something else, or does not answer.
    pub async fn find(path: &Path) -> Result<Self> {
        let version = version(path).await?;
        let devices = timeout(DEADLINE, devices(path)).await;
        let devices = devices
            .map_err(|_| Error::Hypervisor(format!("{} does not say what devices it has", path.display())))??;
        Ok(Self { version, devices })
    }

    /// Whether it was built with the device `driver`.
    pub fn has(&self, driver: &str) -> bool {
        self.devices.iter().any(|device| device == driver)
    }
}

/// The first line of `--version`.
async fn version(path: &Path) -> Result<String> {
    let run = Command::new(path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(DEADLINE, run)
        .await
        .map_err(|_| Error::Hypervisor(format!("{} --version does not end", path.display())))?
        .map_err(Error::host(format!("execute {}", path.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default();
    match line.strip_prefix("QEMU emulator version ") {
        Some(version) => Ok(version.to_owned()),
        None => Err(Error::Invalid(format!("{} is not QEMU: --version does not say so", path.display()))),
    }
}

async fn devices(path: &Path) -> Result<Vec<String>> {
    let (qmp, socket) = Qmp::pair("QEMU").map_err(Error::host("make QEMU's socket pair"))?;
    let monitor = format!("socket,id=qmp,fd={}", socket.as_raw_fd());
    let arguments = ["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S"];
    let monitor = ["-chardev", &monitor, "-mon", "chardev=qmp,mode=control"];
    let arguments: Vec<String> = arguments.iter().chain(&monitor).map(|word| (*word).to_owned()).collect();
    let process = Process::start(path, &arguments, vec![socket])?;
    let asked = async {
        qmp.negotiate().await?;
        qmp.execute("qom-list-types", json!({ "implements": "device" })).await
    };
    let answer = tokio::select! {
        biased;
        ended = process.ended() => Err(Error::Hypervisor(process.describe(&ended))),
        answer = asked => answer,
    };
    process.kill();
    process.ended().await;
    let types = answer?;
    let names = types.as_array().into_iter().flatten().filter_map(|kind| kind["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}
