//! What an installed Firecracker can do: asked of its API, which it serves before there is a VM and without KVM.

use std::path::Path;

use caisson_protocol::vmm::CapabilitiesResponse;
use caisson_vmm_launcher::{
    Error, Result,
    ability::Ability::{self, Device, Hotplug, Operation},
    ask,
    jail::Jail,
    process::{Streams, lasting_pipe},
};
use hyper::Method;

use crate::{api::Api, log::Log};

/// In the jail's own root directory, so that it goes with the jail.
const SOCKET: &str = "/firecracker.sock";

/// The endpoints that the launcher needs for each; they are called as Firecracker's specification calls them.
const ABILITIES: &[(Ability, &[(Method, &str)])] = &[
    (Device("block"), &[(Method::PUT, "/drives/{drive_id}")]),
    (Device("net"), &[(Method::PUT, "/network-interfaces/{iface_id}")]),
    (Device("vsock"), &[(Method::PUT, "/vsock")]),
    (Device("pmem"), &[(Method::PUT, "/pmem/{id}")]),
    (Device("balloon"), &[(Method::PUT, "/balloon")]),
    (Device("rng"), &[(Method::PUT, "/entropy")]),
    // The serial port, which every guest has.
    (Device("console"), &[]),
    (Hotplug("block"), &[(Method::PATCH, "/drives/{drive_id}")]),
    (Operation("pause"), &[(Method::PATCH, "/vm")]),
    (Operation("snapshot"), &[(Method::PUT, "/snapshot/create"), (Method::PUT, "/snapshot/load")]),
    (Operation("resize-balloon"), &[(Method::PATCH, "/balloon")]),
    (Operation("resize-memory"), &[(Method::PUT, "/hotplug/memory"), (Method::PATCH, "/hotplug/memory")]),
];

/// Asks the Firecracker at `path`, which is `version`.
///
/// # Errors
/// When it does not start or does not answer as it should.
pub async fn ask(path: &Path, version: &str) -> Result<CapabilitiesResponse> {
    let (near, far) = lasting_pipe().map_err(Error::host("make a pipe for Firecracker's log"))?;
    let log = Log::over(near);
    let arguments = ["--api-sock", SOCKET].map(str::to_owned);
    let streams = Streams { stdout: far.into(), ..Streams::none() };
    let process = Jail::default().start(path, &arguments, Vec::new(), streams)?;
    let socket = format!("/proc/{}/root{SOCKET}", process.pid());
    let asked = async {
        let api = Api::over(log.connect(Path::new(&socket)).await?).await?;
        abilities(&api, version).await
    };
    ask::answer(process, asked).await
}

/// What a Firecracker with this API can do.
pub async fn abilities(api: &Api, version: &str) -> Result<CapabilitiesResponse> {
    let mut told = CapabilitiesResponse { version: version.to_owned(), ..Default::default() };
    for (ability, endpoints) in ABILITIES {
        let mut can = Ok(());
        for (method, path) in *endpoints {
            if !api.has(method, path).await? {
                can = Err(format!("Firecracker {version} has no {method} {path}"));
            }
        }
        ability.tell(can, &mut told);
    }
    Ok(told)
}
