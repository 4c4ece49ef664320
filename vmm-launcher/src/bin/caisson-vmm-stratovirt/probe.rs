//! Which devices an installed StratoVirt was built with. Its `qom-list-types` and `device-list-properties` do not say: they
//! are the same for every build (`list_type`, machine_manager/src/machine.rs of version 2.5.0). So it is asked for VMs that
//! cannot be, and tells by its refusal whether it knows the device. It needs KVM to come so far.

use std::path::Path;

use caisson_protocol::vmm::CapabilitiesResponse;
use caisson_vmm_launcher::{
    Error, Result,
    ability::Ability::{Device, Hotplug, Operation},
    ask,
    jail::{Jail, inside},
    process::{Process, Streams},
};

/// The driver that a kind of device takes.
const DRIVERS: &[(&str, &str)] = &[
    ("block", "virtio-blk-device"),
    ("net", "virtio-net-device"),
    ("vsock", "vhost-vsock-device"),
    ("fs", "vhost-user-fs-device"),
    ("balloon", "virtio-balloon-device"),
    ("rng", "virtio-rng-device"),
];
/// It had a machine and came to its devices.
const REFUSED: &str = "Failed to realize micro VM";
/// No driver of any build: it keeps the VM from being where the device before it needs nothing.
const NOTHING: &str = "nothing";

/// What the StratoVirt at `path` can give a guest.
///
/// # Errors
/// When it does not start or says something else than expected.
pub async fn devices(path: &Path, told: &mut CapabilitiesResponse) -> Result<()> {
    let start = |&(kind, driver)| Ok((kind, driver, start(path, driver)?));
    let asked = DRIVERS.iter().map(start).collect::<Result<Vec<_>>>()?;
    let mut answers = Vec::with_capacity(asked.len());
    for &(kind, driver, ref process) in &asked {
        answers.push((kind, driver, knows(process, driver).await));
    }
    // All have ended, also where one of them says something else.
    for (kind, driver, answer) in answers {
        let can = match answer? {
            true => Ok(()),
            false => Err(format!("this StratoVirt was built without {driver}")),
        };
        match kind {
            "block" => Hotplug(kind).tell(can.clone(), told),
            "balloon" => Operation("resize-balloon").tell(can.clone(), told),
            _ => {}
        }
        Device(kind).tell(can, told);
    }
    // The serial port, which every guest has.
    Device("console").tell(Ok(()), told);
    Ok(())
}

/// A StratoVirt that is to refuse a VM with nothing that such a device needs.
fn start(path: &Path, driver: &str) -> Result<Process> {
    let mut jail = Jail::default();
    jail.show("/dev/kvm", "/dev/kvm", true);
    // Files have to be there, and are not read before it comes to the devices.
    let file = inside(path).display().to_string();
    let device = |driver: &str| format!("{driver},id=asked-{driver}");
    // Sockets go with the jail.
    let words = [
        ["-machine", "microvm"],
        ["-qmp", "unix:/stratovirt.sock,server,nowait"],
        ["-kernel", &file],
        ["-initrd", &file],
        ["-device", &device(driver)],
        ["-device", &device(NOTHING)],
    ];
    jail.start(path, &words.concat().into_iter().map(str::to_owned).collect::<Vec<_>>(), Vec::new(), Streams::none())
}

async fn knows(process: &Process, driver: &str) -> Result<bool> {
    let ended = ask::end(process).await?;
    let says = |words: &str| ended.stderr.contains(words);
    if says(&format!("Unsupported device: \"{driver}\"")) {
        return Ok(false);
    }
    if says(REFUSED) {
        return Ok(true);
    }
    Err(Error::Hypervisor(format!("StratoVirt does not say whether it has {driver}: {}", process.describe(&ended))))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn told(refusal: &str) -> Result<bool> {
        let arguments = ["-c".to_owned(), format!("echo '{refusal}' >&2; exit 1")];
        knows(&Process::start(Path::new("/bin/sh"), &arguments, Vec::new())?, "virtio-rng-device").await
    }

    #[tokio::test]
    async fn a_device_whose_configuration_is_refused_is_known() {
        assert!(told("Failed to realize micro VM.: add virtio-rng-device fail.: no rng").await.unwrap());
    }

    #[tokio::test]
    async fn a_device_that_stands_before_the_one_that_is_refused_is_known() {
        assert!(told("Failed to realize micro VM.: Unsupported device: \"nothing\"").await.unwrap());
    }

    #[tokio::test]
    async fn a_device_that_is_unsupported_is_not_known() {
        assert!(!told("Failed to realize micro VM.: Unsupported device: \"virtio-rng-device\"").await.unwrap());
    }

    #[tokio::test]
    async fn another_refusal_is_told_as_it_is() {
        let error = told("Failed to init MicroVM: no KVM").await.unwrap_err().to_string();
        assert!(error.starts_with("StratoVirt does not say whether it has virtio-rng-device: "), "{error}");
        assert!(error.ends_with("Failed to init MicroVM: no KVM"), "{error}");
    }
}
