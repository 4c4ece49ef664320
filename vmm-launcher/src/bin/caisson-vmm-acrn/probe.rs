//! Which devices an installed acrn-dm has. It takes its arguments one after the other (devicemodel/core/main.c): a device
//! that it does not know ends it before it comes to the question for its version.

use std::path::Path;

use caisson_protocol::vmm::CapabilitiesResponse;
use caisson_vmm_launcher::{
    Error, Result,
    ability::Ability::{Device, Hotplug},
    ask::{self, Said},
};

/// What a kind of device is called.
const DEVICES: &[(&str, &str)] =
    &[("block", "virtio-blk"), ("net", "virtio-net"), ("vsock", "vhost-vsock"), ("rng", "virtio-rnd")];

/// The version of the acrn-dm at `path`: `-v` says "DM: <version> (tag: …) build by …".
///
/// # Errors
/// When it is something else, or does not answer.
pub async fn version(path: &Path) -> Result<String> {
    let version = ask::version(path, "-v", "acrn-dm", "DM: ").await?;
    Ok(version.split(" build by ").next().unwrap_or(&version).to_owned())
}

/// What the acrn-dm at `path` can give a guest.
///
/// # Errors
/// When it does not answer, or says something else than expected.
pub async fn devices(path: &Path, told: &mut CapabilitiesResponse) -> Result<()> {
    for (kind, device) in DEVICES {
        let can = match knows(path, device).await? {
            true => Ok(()),
            false => Err(format!("this acrn-dm has no {device}")),
        };
        // Disks that are empty can be filled while the guest runs, and nothing else.
        if *kind == "block" {
            Hotplug(kind).tell(can.clone(), told);
        }
        Device(kind).tell(can, told);
    }
    // The first serial port, which every guest has.
    Device("console").tell(Ok(()), told);
    Ok(())
}

async fn knows(path: &Path, device: &str) -> Result<bool> {
    let Said { words, ended } = ask::words(path, &["-s", &format!("2,{device}"), "-v"]).await?;
    if ended.well() {
        return Ok(true);
    }
    // It says some things on its standard output.
    let words = [words.trim(), &ended.stderr].join(" ");
    if words.contains("unknown device") {
        return Ok(false);
    }
    Err(Error::Hypervisor(format!("{} does not say whether it has {device}: {}", path.display(), words.trim())))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    async fn told(script: &str) -> Result<CapabilitiesResponse> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("acrn-dm");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut told = CapabilitiesResponse::default();
        devices(&path, &mut told).await.map(|()| told)
    }

    #[tokio::test]
    async fn a_device_that_it_does_not_know_is_missing_by_its_name() {
        let refuses =
            "case $2 in 2,vhost-vsock) echo 'pci slot 2:0: unknown device \"vhost-vsock\"' >&2; exit 1;; esac";
        let told = told(refuses).await.unwrap();
        assert_eq!(told.devices, ["block", "net", "rng", "console"]);
        assert_eq!(told.hotplug, ["block"]);
        assert_eq!(told.missing["vsock"], "this acrn-dm has no vhost-vsock");
    }

    #[tokio::test]
    async fn one_that_fails_otherwise_is_told_in_its_words() {
        let error = told("echo vm_open: no such device; exit 1").await.unwrap_err().to_string();
        assert!(error.ends_with("does not say whether it has virtio-blk: vm_open: no such device"), "{error}");
    }
}
