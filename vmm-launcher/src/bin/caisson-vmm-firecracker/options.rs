//! Firecracker's own options.

use caisson_vmm_launcher::{
    block_driver::{BlockDriver, Bus},
    options::{Need, OptionDoc},
};
use serde::{Deserialize, Serialize};

/// The `[hypervisor.firecracker]` table's own keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub block_device_driver: BlockDriver,
    pub spare_read_only_disks: u8,
    pub spare_writable_disks: u8,
    pub pci: bool,
    pub extra_args: Vec<String>,
}

impl Options {
    /// What devices are on.
    pub fn bus(&self) -> Bus {
        if self.pci { Bus::Pci } else { Bus::Mmio }
    }
}

/// The same keys for people.
pub const DOCS: &[OptionDoc] = &[
    BlockDriver::DOC,
    OptionDoc {
        key: "spare_read_only_disks",
        kind: "integer",
        accepted: &["0", "255"],
        doc: "How many read-only disks the guest can be given while it runs, at least; each is an empty disk until then. A \
              pod that may have several containers is given more, for two of them, as far as there is room.",
    },
    OptionDoc {
        key: "spare_writable_disks",
        kind: "integer",
        accepted: &["0", "255"],
        doc: "How many writable disks the guest can be given while it runs, at least; each is an empty disk until then. A \
              pod that may have several containers is given more, for two of them, as far as there is room.",
    },
    OptionDoc {
        key: "pci",
        kind: "bool",
        accepted: &[],
        doc: "Whether devices are on PCI, which has room for more of them than MMIO and starts more slowly.",
    },
    OptionDoc {
        key: "extra_args",
        kind: "array",
        accepted: &[],
        doc: "Arguments that are added to Firecracker's command line as they are.",
    },
];

/// Which bus there is.
pub const NEEDS: &[Need] = &[
    Need { key: "block_device_driver", value: "virtio-blk-pci", needs: "pci", needed: "true" },
    Need { key: "block_device_driver", value: "virtio-blk-mmio", needs: "pci", needed: "false" },
    Need { key: "block_device_driver", value: "virtio-mmio", needs: "pci", needed: "false" },
];

#[cfg(test)]
mod tests {
    use caisson_vmm_launcher::options::discrepancies;

    use super::*;

    #[test]
    fn what_is_documented_is_what_is_read() {
        assert_eq!(discrepancies::<Options>(DOCS), Vec::<String>::new());
    }
}
