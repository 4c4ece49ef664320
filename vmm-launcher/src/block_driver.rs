//! `block_device_driver`: how a guest is to see its disks. The bus is the hypervisor's; a word that names another one is
//! refused.

use serde::{Deserialize, Serialize};

use crate::{Error, Result, options::OptionDoc};

/// What the key takes, in Kata Containers' words. Disks are virtio-blk with every hypervisor.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub enum BlockDriver {
    /// On whichever bus the machine has.
    #[default]
    #[serde(rename = "virtio-blk")]
    Any,
    /// On PCI.
    #[serde(rename = "virtio-blk-pci")]
    Pci,
    /// On MMIO.
    #[serde(rename = "virtio-blk-mmio", alias = "virtio-mmio")]
    Mmio,
}

/// What a machine has its devices on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// PCI.
    Pci,
    /// Memory-mapped registers that the kernel is told of.
    Mmio,
}

impl BlockDriver {
    /// The key of a hypervisor whose machines are on either bus.
    pub const DOC: OptionDoc = Self::doc(&["virtio-blk", "virtio-blk-pci", "virtio-blk-mmio", "virtio-mmio"]);
    /// The key of a hypervisor whose machines are on PCI.
    pub const PCI_DOC: OptionDoc = Self::doc(&["virtio-blk", "virtio-blk-pci"]);
    /// The key of a hypervisor whose machines are on MMIO.
    pub const MMIO_DOC: OptionDoc = Self::doc(&["virtio-blk", "virtio-blk-mmio", "virtio-mmio"]);

    /// Refuses what a machine on `bus` does not have.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check(self, bus: Bus) -> Result<()> {
        match (self, bus) {
            (Self::Any, _) | (Self::Pci, Bus::Pci) | (Self::Mmio, Bus::Mmio) => Ok(()),
            (Self::Pci, Bus::Mmio) => {
                Err(Error::Invalid("block_device_driver is for PCI, which the machine has not".into()))
            }
            (Self::Mmio, Bus::Pci) => {
                Err(Error::Invalid("block_device_driver is for MMIO, and the machine has PCI".into()))
            }
        }
    }

    const fn doc(accepted: &'static [&'static str]) -> OptionDoc {
        OptionDoc {
            key: "block_device_driver",
            kind: "string",
            accepted,
            doc: "What the guest sees its disks as: virtio-blk on whichever bus its machine has; the other words demand \
                  PCI or MMIO (virtio-mmio is Kata Containers' other name for that).",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_for_another_bus_is_refused() {
        assert!(BlockDriver::Pci.check(Bus::Mmio).is_err() && BlockDriver::Mmio.check(Bus::Pci).is_err());
        assert!(BlockDriver::Pci.check(Bus::Pci).is_ok() && BlockDriver::Mmio.check(Bus::Mmio).is_ok());
        assert!(BlockDriver::Any.check(Bus::Pci).is_ok() && BlockDriver::Any.check(Bus::Mmio).is_ok());
    }
}
