//! A QEMU whose launcher was killed goes on with another one. It listens for that on sockets in the state directory.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
};

use caisson_vmm_launcher::{
    Error, Result, console::Console, hypervisor::Adopted, outlive::Memory, process::Process, qmp::Qmp, sockets::Sockets,
};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::{Qemu, status};
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

/// The sockets on which QEMU takes one launcher after the other: for its machine protocol, and for the console.
pub fn sockets(state_dir: &Path) -> [PathBuf; 2] {
    ["qmp.sock", "console.sock"].map(|name| state_dir.join(name))
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
    let [protocol, serial] = sockets(state_dir);
    let names = Sockets(vec![protocol.clone(), serial.clone()]);
    let own: Own = memory.own()?;
    let process = Process::adopt(&memory.process)?;
    let qmp = Qmp::over("QEMU", connect(&protocol).await?);
    qmp.negotiate().await?;
    let console = Console::adopt(connect(&serial).await?, memory.console_log.as_deref())?;
    let helpers = Helpers::adopt(&own.helpers, names)?;
    let state = status::state(&qmp).await?;
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
        console_log: memory.console_log,
    };
    Ok(Adopted { hypervisor, state })
}

async fn connect(socket: &Path) -> Result<UnixStream> {
    UnixStream::connect(socket).await.map_err(Error::host(format!("connect to QEMU's {}", socket.display())))
}
