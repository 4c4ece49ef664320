//! What an installed QEMU is and has: asked of itself, on a machine without anything.

use std::{os::fd::AsRawFd, path::Path};

use caisson_vmm_launcher::{Error, Result, ask, process::Process, qmp::Qmp};
use serde_json::json;

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
        let version = ask::version(path, "--version", "QEMU", "QEMU emulator version ").await?;
        Ok(Self { version, devices: devices(path).await? })
    }

    /// Whether it was built with the device `driver`, or that it was not.
    pub fn can_give(&self, driver: &str) -> Result<(), String> {
        let has = self.devices.iter().any(|device| device == driver);
        has.then_some(()).ok_or_else(|| format!("this QEMU was built without {driver}"))
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
    let types = ask::answer(process, asked).await?;
    let names = types.as_array().into_iter().flatten().filter_map(|kind| kind["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}
