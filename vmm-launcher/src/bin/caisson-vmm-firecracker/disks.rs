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

/// A disk that is empty.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Spare {
    /// As Firecracker calls it.
    pub id: String,
    /// Firecracker does not change that later.
    pub writable: bool,
}

/// The spare disks of a new VM. In the order of the guest's names for them.
pub fn spares(options: &Options) -> Vec<Spare> {
    let spare = |writable, kind| move |number| Spare { id: format!("spare_{kind}_{number}"), writable };
    let read_only = (0..options.spare_read_only_disks).map(spare(false, "ro"));
    read_only.chain((0..options.spare_writable_disks).map(spare(true, "rw"))).collect()
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
}

impl Spares {
    /// All of them empty.
    pub fn new(mut spares: Vec<Spare>) -> Self {
        // The first to be taken is at the end.
        spares.reverse();
        Self { disks: Mutex::new(Disks { free: spares, attached: HashMap::new() }) }
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
        if disks.attached.contains_key(id) {
            return Err(Error::Invalid(format!("a device is attached as \"{id}\" already")));
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

    fn spares_of(read_only: u8, writable: u8) -> Spares {
        let options =
            Options { spare_read_only_disks: read_only, spare_writable_disks: writable, ..Options::default() };
        Spares::new(spares(&options))
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
        assert_eq!(spares.take("a", false).unwrap_err().to_string(), "a device is attached as \"a\" already");
    }
}
