//! Devices of the host that a guest gets to itself, by VFIO: `Documentation/driver-api/vfio.rst` of Linux. What keeps a
//! hypervisor from taking one is looked for before it is asked to, so that it can be told by name.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::{Error, Result};

/// The driver that gives a device to a program.
const DRIVER: &str = "vfio-pci";
/// Drivers that do not stand in the way of the other devices of a group: they do no DMA.
const HARMLESS: [&str; 3] = [DRIVER, "pci-stub", "pcieport"];
/// What a program opens to make a container of groups.
pub const CONTAINER: &str = "/dev/vfio/vfio";

/// A PCI function of the host that can be given away.
#[derive(Debug, PartialEq, Eq)]
pub struct HostDevice {
    /// `0000:41:00.0`
    pub address: String,
    /// Its directory in sysfs, without symbolic links.
    pub sysfs: PathBuf,
    /// `/dev/vfio/<number>`, the whole group's.
    pub group: PathBuf,
}

impl HostDevice {
    /// The one at `address`.
    ///
    /// # Errors
    /// When there is none, or it cannot be given away as the host is: what to change.
    pub fn find(address: &str) -> Result<Self> {
        Self::find_in(Path::new("/"), address)
    }

    fn find_in(root: &Path, address: &str) -> Result<Self> {
        check_address(address)?;
        let refused = |why: String| Err(Error::Invalid(format!("PCI device {address} {why}")));
        let link = root.join("sys/bus/pci/devices").join(address);
        let Ok(sysfs) = fs::canonicalize(&link) else {
            return Err(Error::Invalid(format!("there is no PCI device {address}")));
        };
        let Ok(group) = fs::canonicalize(sysfs.join("iommu_group")) else {
            return refused(format!("is in no IOMMU group: {NO_IOMMU}"));
        };
        let number = name(&group);
        match driver(&sysfs) {
            Some(driver) if driver == DRIVER => {}
            Some(driver) => return refused(format!("is used by the driver {driver}; bind it to {DRIVER}")),
            None => return refused(format!("has no driver; bind it to {DRIVER}")),
        }
        let neighbours =
            fs::read_dir(group.join("devices")).map_err(Error::host(format!("read IOMMU group {number}")))?;
        for neighbour in neighbours.filter_map(|entry| fs::canonicalize(entry.ok()?.path()).ok()) {
            if let Some(driver) = driver(&neighbour).filter(|driver| !HARMLESS.contains(&driver.as_str())) {
                let other = name(&neighbour);
                return refused(format!(
                    "shares IOMMU group {number} with {other}, which the driver {driver} uses; bind that to {DRIVER} too"
                ));
            }
        }
        let device = root.join("dev/vfio").join(&number);
        match fs::metadata(&device) {
            Ok(_) => Ok(Self { address: address.to_owned(), sysfs, group: device }),
            Err(source) => Err(Error::File { what: "IOMMU group", path: device, source }),
        }
    }
}

const NO_IOMMU: &str = "this machine has no IOMMU, or its kernel was not told to use it (intel_iommu=on, amd_iommu=on)";

/// Whether devices of this host can be given away at all, or why not.
///
/// # Errors
/// When there is no IOMMU.
pub fn available() -> Result<(), String> {
    let groups = fs::read_dir("/sys/kernel/iommu_groups").is_ok_and(|mut groups| groups.next().is_some());
    if groups { Ok(()) } else { Err(NO_IOMMU.to_owned()) }
}

/// Refuses what is no PCI address with its domain.
///
/// # Errors
/// [`Error::Invalid`].
pub fn check_address(address: &str) -> Result<()> {
    let hexadecimal =
        |text: &str, digits: usize| text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let well_formed = || {
        let (domain, rest) = address.split_once(':')?;
        let (bus, rest) = rest.split_once(':')?;
        let (slot, function) = rest.split_once('.')?;
        let function = function.len() == 1 && (b'0'..=b'7').contains(&function.as_bytes()[0]);
        Some(hexadecimal(domain, 4) && hexadecimal(bus, 2) && hexadecimal(slot, 2) && function)
    };
    match well_formed() {
        Some(true) => Ok(()),
        _ => Err(Error::Invalid(format!(
            "\"{}\" is not a PCI device's address of the form 0000:41:00.0",
            address.escape_debug()
        ))),
    }
}

/// Lets process `pid` pin its guest's memory, all of which the device may write to.
///
/// # Errors
/// When the launcher has not the right to.
pub fn let_pin_memory(pid: u32) -> Result<()> {
    let unlimited = Rlimit { current: None, maximum: None };
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    prlimit(process, Resource::Memlock, unlimited)
        .map(drop)
        .map_err(|error| Error::host(format!("let the hypervisor (pid {pid}) lock memory"))(io::Error::from(error)))
}

fn driver(sysfs: &Path) -> Option<String> {
    Some(name(&fs::read_link(sysfs.join("driver")).ok()?))
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const CARD: &str = "0000:41:00.0";

    /// A host with PCI devices, each with its group and its driver.
    fn host(devices: &[(&str, Option<&str>, Option<&str>)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let bus = root.path().join("sys/bus/pci/devices");
        fs::create_dir_all(&bus).unwrap();
        fs::create_dir_all(root.path().join("dev/vfio")).unwrap();
        for (address, group, driver) in devices {
            let device = root.path().join("sys/devices").join(address);
            fs::create_dir_all(&device).unwrap();
            symlink(&device, bus.join(address)).unwrap();
            if let Some(group) = group {
                let groups = root.path().join("sys/kernel/iommu_groups").join(group);
                fs::create_dir_all(groups.join("devices")).unwrap();
                symlink(&device, groups.join("devices").join(address)).unwrap();
                symlink(&groups, device.join("iommu_group")).unwrap();
                fs::write(root.path().join("dev/vfio").join(group), "").unwrap();
            }
            if let Some(driver) = driver {
                symlink(Path::new("/sys/bus/pci/drivers").join(driver), device.join("driver")).unwrap();
            }
        }
        root
    }

    fn refusal(devices: &[(&str, Option<&str>, Option<&str>)]) -> String {
        HostDevice::find_in(host(devices).path(), CARD).unwrap_err().to_string()
    }

    #[test]
    fn a_device_that_is_bound_for_it_is_found_with_its_group() {
        let host = host(&[(CARD, Some("7"), Some("vfio-pci")), ("0000:40:00.0", Some("7"), Some("pcieport"))]);
        let found = HostDevice::find_in(host.path(), CARD).unwrap();
        assert_eq!(found.group, host.path().join("dev/vfio/7"));
        assert!(found.sysfs.ends_with("sys/devices/0000:41:00.0"));
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        assert_eq!(refusal(&[]), "there is no PCI device 0000:41:00.0");
    }

    #[test]
    fn a_host_without_an_iommu_is_told_what_to_switch_on() {
        let told = refusal(&[(CARD, None, Some("vfio-pci"))]);
        assert!(told.starts_with("PCI device 0000:41:00.0 is in no IOMMU group: this machine has no IOMMU"), "{told}");
    }

    #[test]
    fn a_device_that_the_host_uses_is_not_taken_from_it() {
        let told = refusal(&[(CARD, Some("7"), Some("nvme"))]);
        assert_eq!(told, "PCI device 0000:41:00.0 is used by the driver nvme; bind it to vfio-pci");
        let told = refusal(&[(CARD, Some("7"), None)]);
        assert_eq!(told, "PCI device 0000:41:00.0 has no driver; bind it to vfio-pci");
    }

    #[test]
    fn a_neighbour_that_the_host_uses_is_named() {
        let told = refusal(&[(CARD, Some("7"), Some("vfio-pci")), ("0000:41:00.1", Some("7"), Some("snd_hda_intel"))]);
        assert_eq!(
            told,
            "PCI device 0000:41:00.0 shares IOMMU group 7 with 0000:41:00.1, which the driver snd_hda_intel uses; bind \
             that to vfio-pci too"
        );
    }

    #[test]
    fn what_is_no_address_is_never_a_path() {
        for address in ["", "41:00.0", "0000:41:00.8", "0000:41:00", "../../../../x", "0000:41:00.0/..", "0000:4é:00.0"]
        {
            let refusal = check_address(address).unwrap_err().to_string();
            assert!(refusal.ends_with("is not a PCI device's address of the form 0000:41:00.0"), "{refusal}");
        }
    }
}
