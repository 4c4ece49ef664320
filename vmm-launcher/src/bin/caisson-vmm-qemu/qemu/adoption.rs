//! A QEMU whose launcher was killed goes on with another one. It listens for that on sockets in the state directory.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use caisson_protocol::vmm::VmState;
use caisson_vmm_launcher::{
    Error, Result, console::Console, hypervisor::Adopted, outlive::Memory, process::Process, qmp::Qmp,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::UnixStream;

use super::Qemu;
use crate::{
    helpers::{Helpers, KnownHelpers},
    hotplug::{self, Slots},
    options::MachineType,
    sizes::{KnownSizes, Sizes},
};

/// What another launcher needs to know, beside QEMU's process.
#[derive(Debug, Deserialize, Serialize)]
struct Own {
    run_dir: PathBuf,
    machine_type: MachineType,
    devices: hotplug::Devices,
    sizes: KnownSizes,
    unsaveable: Option<String>,
    helpers: KnownHelpers,
}

/// The sockets on which QEMU takes one launcher after the other.
#[derive(Debug)]
pub struct Sockets {
    pub qmp: PathBuf,
    pub console: PathBuf,
}

impl Sockets {
    pub fn in_dir(state_dir: &Path) -> Self {
        Self { qmp: state_dir.join("qmp.sock"), console: state_dir.join("console.sock") }
    }

    pub fn remove(&self) {
        for socket in [&self.qmp, &self.console] {
            let _ = fs::remove_file(socket);
        }
    }
}

pub fn remember(qemu: &Qemu) -> Result<Memory> {
    let own = Own {
        run_dir: qemu.run_dir.clone(),
        machine_type: qemu.slots.machine_type(),
        devices: qemu.slots.devices(),
        sizes: qemu.sizes.known(),
        unsaveable: qemu.unsaveable.clone(),
        helpers: qemu.known.clone(),
    };
    Ok(Memory {
        process: qemu.process.known(),
        console_log: qemu.console_log.clone(),
        own: serde_json::to_value(own).expect("paths of requests are UTF-8"),
    })
}

pub async fn adopt(state_dir: &Path, memory: Memory) -> Result<Adopted<Qemu>> {
    let own: Own = memory.own()?;
    let process = Process::adopt(&memory.process)?;
    let sockets = Sockets::in_dir(state_dir);
    let qmp = Qmp::over("QEMU", connect(&sockets.qmp).await?);
    qmp.negotiate().await?;
    let console = Console::adopt(connect(&sockets.console).await?, memory.console_log.as_deref())?;
    let helpers = Helpers::adopt(&own.helpers)?;
    let status = qmp.execute("query-status", json!({})).await?;
    let state = match status["status"].as_str() {
        Some("prelaunch" | "inmigrate") => VmState::CREATED,
        Some("paused") => VmState::PAUSED,
        _ => VmState::RUNNING,
    };
    let hypervisor = Qemu {
        process,
        qmp,
        console,
        helpers: Mutex::new(helpers),
        slots: Slots::adopt(own.machine_type, own.devices),
        sizes: Sizes::adopt(own.machine_type, own.sizes),
        run_dir: own.run_dir,
        unsaveable: own.unsaveable,
        known: own.helpers,
        sockets: Some(sockets),
        console_log: memory.console_log,
    };
    Ok(Adopted { hypervisor, state })
}

async fn connect(socket: &Path) -> Result<UnixStream> {
    UnixStream::connect(socket).await.map_err(Error::host(format!("connect to QEMU's {}", socket.display())))
}
