//! Disks that come and go while the guest runs: Firecracker's API changes the file behind a disk, so that there are empty
//! disks from the start. The guest is told that its disk has another size.

use std::{collections::HashMap, path::Path, sync::Mutex};

use caisson_protocol::vmm::Block;
use caisson_vmm_launcher::{Error, Result, jail};
use serde::{Deserialize, Serialize};

use crate::{
    api::Api,
    configuration::iface,
    layout::{self, EMPTY},
    options::Options,
};

/// What the guest's image is called as a disk.
pub const ROOT: &str = "image";
/// How the names of spare disks begin.
const SPARE: &str = "spare_";

/// A disk that is empty.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Spare {
    /// As Firecracker calls it.
    pub id: String,
    /// Firecracker does not change that later.
    pub writable: bool,
}

/// Firecracker's interrupt lines on x86-64, but those of its two ACPI devices: `GSI_LEGACY_NUM`.
const MMIO_PLACES: usize = 17;
/// A bus has 32, and the first is the bus's own.
const PCI_PLACES: usize = 31;
/// How many of the disks that a VM is likely to be given are writable: one for each of two more containers.
const WRITABLE: usize = 2;

/// The spare disks of a new VM with so many `other` devices: those that the options demand, and as far as there is room as
/// many as it is `likely` to be given. In the order of the guest's names for them.
///
/// # Errors
/// When there is no room for what was asked for.
pub fn spares(options: &Options, other: usize, likely: usize) -> Result<Vec<Spare>> {
    let (places, bus) = if options.pci { (PCI_PLACES, "PCI") } else { (MMIO_PLACES, "MMIO") };
    let (least_read_only, least_writable) = (options.spare_read_only_disks.into(), options.spare_writable_disks.into());
    let Some(free) = places.checked_sub(other + least_read_only + least_writable) else {
        let more = if options.pci { String::new() } else { format!(", or set pci = true for {PCI_PLACES}") };
        return Err(Error::Invalid(format!(
            "the VM has {other} devices, {least_read_only} spare read-only and {least_writable} spare writable disks, and \
             Firecracker has room for {places} on {bus}: lower spare_read_only_disks or spare_writable_disks, or \
             rootfs_max_disks if they are one container's{more}"
        )));
    };
    let more_writable = likely.min(WRITABLE).saturating_sub(least_writable).min(free);
    let more_read_only = likely.saturating_sub(WRITABLE).saturating_sub(least_read_only).min(free - more_writable);
    let spare = |writable, kind| move |number| Spare { id: format!("{SPARE}{kind}_{number}"), writable };
    let read_only = (0..least_read_only + more_read_only).map(spare(false, "ro"));
    Ok(read_only.chain((0..least_writable + more_writable).map(spare(true, "rw"))).collect())
}

/// Whether a disk cannot be called `id`, as Firecracker calls it: two of one name are one to it.
pub fn is_reserved(id: &str) -> bool {
    id == ROOT || id.starts_with(SPARE)
}

/// The spare disks of a running VM, and what was attached to them.
#[derive(Debug)]
pub struct Spares {
    disks: Mutex<Disks>,
}

/// What another launcher needs to know of them.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Disks {
    free: Vec<Spare>,
    attached: HashMap<String, Spare>,
    /// Devices of the VM that have their names for good.
    #[serde(default)]
    born_with: Vec<String>,
}

impl Spares {
    /// All of them empty, of a VM that is born with devices.
    pub fn new(mut spares: Vec<Spare>, born_with: Vec<String>) -> Self {
        // The first to be taken is at the end.
        spares.reverse();
        Self { disks: Mutex::new(Disks { free: spares, attached: HashMap::new(), born_with }) }
    }

    /// Those of an adopted VM.
    pub fn adopt(disks: Disks) -> Self {
        Self { disks: Mutex::new(disks) }
    }

    /// Which of them has what.
    pub fn disks(&self) -> Disks {
        self.lock().clone()
    }

    /// Puts `block` behind a spare disk of the VM that is process `jailed`.
    pub async fn attach(&self, id: &str, block: &Block, jailed: u32, api: &Api) -> Result<()> {
        let spare = self.take(id, !block.read_only)?;
        let inside = layout::disk(id);
        let attached = async {
            jail::show(jailed, Path::new(&block.path), Path::new(&inside), spare.writable).await?;
            let changed = change(api, &spare, &inside).await;
            if changed.is_err() {
                jail::hide(jailed, Path::new(&inside)).await?;
            }
            changed
        };
        let attached = attached.await;
        if attached.is_err() {
            self.give_back(id);
        }
        attached
    }

    /// Takes what was attached as `id` from behind its disk, whether the guest still uses it or not.
    pub async fn detach(&self, id: &str, jailed: u32, api: &Api) -> Result<()> {
        let spare = self.lock().attached.get(id).cloned().ok_or_else(|| {
            Error::Invalid(format!("no device was attached as \"{}\" while the VM ran", id.escape_debug()))
        })?;
        change(api, &spare, &layout::in_run(EMPTY)).await?;
        jail::hide(jailed, Path::new(&layout::disk(id))).await?;
        self.give_back(id);
        Ok(())
    }

    /// Whether any disk is attached.
    pub fn any_attached(&self) -> bool {
        !self.lock().attached.is_empty()
    }

    fn take(&self, id: &str, writable: bool) -> Result<Spare> {
        let disks = &mut *self.lock();
        if disks.attached.contains_key(id) || disks.born_with.iter().any(|born| born == id) {
            return Err(Error::Invalid(format!("the VM has a device \"{id}\" already")));
        }
        let Some(at) = disks.free.iter().rposition(|spare| spare.writable == writable) else {
            let (kind, key) =
                if writable { ("writable", "spare_writable_disks") } else { ("read-only", "spare_read_only_disks") };
            return Err(Error::Invalid(format!(
                "every spare {kind} disk is taken: detach one, or raise {key} in the configuration"
            )));
        };
        let spare = disks.free.remove(at);
        disks.attached.insert(id.to_owned(), spare.clone());
        Ok(spare)
    }

    fn give_back(&self, id: &str) {
        let disks = &mut *self.lock();
        if let Some(spare) = disks.attached.remove(id) {
            disks.free.push(spare);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Disks> {
        self.disks.lock().expect("nobody panics with the disks")
    }
}

async fn change(api: &Api, spare: &Spare, path: &str) -> Result<()> {
    api.change_drive(&iface(&spare.id), path).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(read_only: u8, writable: u8) -> Options {
        Options { spare_read_only_disks: read_only, spare_writable_disks: writable, ..Options::default() }
    }

    fn spares_of(read_only: u8, writable: u8) -> Spares {
        Spares::new(spares(&options(read_only, writable), 1, 0).unwrap(), vec!["root".into()])
    }

    /// How many read-only ones there are, and how many writable ones.
    fn counted(options: &Options, other: usize, likely: usize) -> (usize, usize) {
        let spares = spares(options, other, likely).unwrap();
        let writable = spares.iter().filter(|spare| spare.writable).count();
        (spares.len() - writable, writable)
    }

    #[test]
    fn a_vm_has_as_many_spares_as_it_is_likely_to_need() {
        assert_eq!(counted(&options(0, 0), 5, 0), (0, 0));
        assert_eq!(counted(&options(0, 0), 5, 10), (8, 2));
        assert_eq!(counted(&options(0, 0), 5, 1), (0, 1));
    }

    #[test]
    fn what_the_options_demand_is_the_least() {
        assert_eq!(counted(&options(1, 3), 5, 0), (1, 3));
        assert_eq!(counted(&options(1, 3), 5, 10), (8, 3));
    }

    #[test]
    fn likely_spares_are_only_as_many_as_there_is_room_for() {
        assert_eq!(counted(&options(0, 0), 5, 48), (10, 2));
        assert_eq!(counted(&Options { pci: true, ..options(0, 0) }, 5, 48), (24, 2));
        assert_eq!(counted(&options(0, 0), 17, 48), (0, 0));
    }

    #[test]
    fn more_than_there_is_room_for_is_refused_with_the_keys_to_lower() {
        let refusal = spares(&options(8, 2), 8, 0).unwrap_err().to_string();
        assert!(
            refusal.contains("room for 17 on MMIO: lower spare_read_only_disks or spare_writable_disks"),
            "{refusal}"
        );
        assert!(refusal.ends_with("or set pci = true for 31"), "{refusal}");
        assert!(spares(&Options { pci: true, ..options(8, 2) }, 8, 0).is_ok());
    }

    #[test]
    fn a_device_from_birth_keeps_its_name() {
        let refusal = spares_of(1, 0).take("root", false).unwrap_err().to_string();
        assert_eq!(refusal, "the VM has a device \"root\" already");
    }

    #[test]
    fn a_writable_disk_gets_a_writable_spare() {
        assert_eq!(spares_of(2, 1).take("a", true).unwrap(), Spare { id: "spare_rw_0".into(), writable: true });
    }

    #[test]
    fn without_a_fitting_spare_the_key_to_raise_is_named() {
        let error = spares_of(0, 1).take("a", false).unwrap_err().to_string();
        assert!(error.contains("spare_read_only_disks"), "{error}");
    }

    #[test]
    fn a_spare_that_is_given_back_can_be_taken_again() {
        let spares = spares_of(1, 0);
        spares.take("a", false).unwrap();
        spares.give_back("a");
        assert_eq!(spares.take("b", false).unwrap().id, "spare_ro_0");
    }

    #[test]
    fn a_name_cannot_be_attached_twice() {
        let spares = spares_of(2, 0);
        spares.take("a", false).unwrap();
        assert_eq!(spares.take("a", false).unwrap_err().to_string(), "the VM has a device \"a\" already");
    }
}
