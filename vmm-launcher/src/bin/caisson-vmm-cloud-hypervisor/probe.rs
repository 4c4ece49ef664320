//! What an installed Cloud Hypervisor can do: its help names the devices that it was built with, and its API, which it
//! serves before there is a VM, has the rest.

use std::{os::fd::AsRawFd, path::Path};

use caisson_protocol::vmm::CapabilitiesResponse;
use caisson_vmm_launcher::{
    Error, Result,
    ability::Ability::{self, Device, Hotplug, Operation},
    ask::{self, Said},
    process::Process,
    vfio,
    virtiofsd::connected_listener,
};

use crate::api::Api;

/// The arguments by which a guest is given them.
const DEVICES: &[(&str, &str)] = &[
    ("block", "--disk"),
    ("net", "--net"),
    ("vsock", "--vsock"),
    ("fs", "--fs"),
    ("pmem", "--pmem"),
    ("balloon", "--balloon"),
    ("rng", "--rng"),
    ("console", "--serial"),
    ("vfio", "--device"),
];

/// The requests that the launcher needs for each.
const ABILITIES: &[(Ability, &[&str])] = &[
    (Hotplug("block"), &["vm.add-disk", "vm.remove-device"]),
    (Hotplug("net"), &["vm.add-net", "vm.remove-device"]),
    (Hotplug("fs"), &["vm.add-fs", "vm.remove-device"]),
    (Hotplug("pmem"), &["vm.add-pmem", "vm.remove-device"]),
    (Hotplug("vfio"), &["vm.add-device", "vm.remove-device"]),
    (Operation("pause"), &["vm.pause", "vm.resume"]),
    (Operation("snapshot"), &["vm.snapshot", "vm.restore"]),
    (Operation("resize-vcpus"), &["vm.resize"]),
    (Operation("resize-memory"), &["vm.resize"]),
    (Operation("resize-balloon"), &["vm.resize"]),
];

/// The version of the Cloud Hypervisor at `path`.
///
/// # Errors
/// When it is something else, or does not answer.
pub async fn version(path: &Path) -> Result<String> {
    let version = ask::version(path, "--version", "Cloud Hypervisor", "cloud-hypervisor ").await?;
    Ok(version.trim_start_matches('v').to_owned())
}

/// The devices of the Cloud Hypervisor at `path`, by its help.
///
/// # Errors
/// When it does not answer.
pub async fn devices(path: &Path, told: &mut CapabilitiesResponse) -> Result<()> {
    let Said { words: help, ended } = ask::words(path, &["--help"]).await?;
    if !ended.well() {
        return Err(Error::Hypervisor(format!("{} --help {}", path.display(), ended.how())));
    }
    for (kind, argument) in DEVICES {
        let has = help.split_whitespace().any(|word| word == *argument);
        let can = has.then_some(()).ok_or_else(|| without(&told.version, argument));
        Device(kind).tell(can.and_then(|()| host_has(Device(kind))), told);
    }
    Ok(())
}

/// What else the Cloud Hypervisor at `path` can do, by its API. It needs KVM to start.
///
/// # Errors
/// When it does not start or does not answer as it should.
pub async fn operations(path: &Path, told: &mut CapabilitiesResponse) -> Result<()> {
    let socket = std::env::temp_dir().join(format!("caisson-vmm-{}.sock", std::process::id()));
    let (listener, connection) = connected_listener(&socket)?;
    let arguments = ["--api-socket".to_owned(), format!("fd={}", listener.as_raw_fd())];
    let process = Process::start(path, &arguments, vec![listener.into()])?;
    let asked = async {
        let api = Api::on(connection).await?;
        api.ping().await?;
        abilities(&api, told).await
    };
    ask::answer(process, asked).await
}

/// What can be done with this API.
pub async fn abilities(api: &Api, told: &mut CapabilitiesResponse) -> Result<()> {
    for (ability, requests) in ABILITIES {
        let mut can = host_has(*ability);
        for request in *requests {
            if !api.has(request).await? {
                can = Err(without(&told.version, request));
            }
        }
        ability.tell(can, told);
    }
    Ok(())
}

/// What the host has to have for it.
fn host_has(ability: Ability) -> Result<(), String> {
    match ability {
        Device("vfio") | Hotplug("vfio") => vfio::available(),
        _ => Ok(()),
    }
}

fn without(version: &str, what: &str) -> String {
    format!("Cloud Hypervisor {version} has no {what}")
}
