//! ACRN's own options.

use caisson_vmm_launcher::{block_driver::BlockDriver, options::OptionDoc};
use serde::{Deserialize, Serialize};

/// The `[hypervisor.acrn]` table's own keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub block_device_driver: BlockDriver,
    pub iasl: String,
    pub cpu_affinity: Vec<u32>,
    pub disk_slots: u8,
    pub extra_args: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            block_device_driver: BlockDriver::default(),
            iasl: "/usr/bin/iasl".into(),
            cpu_affinity: Vec::new(),
            disk_slots: 4,
            extra_args: Vec::new(),
        }
    }
}

/// The same keys for people.
pub const DOCS: &[OptionDoc] = &[
    BlockDriver::PCI_DOC,
    OptionDoc {
        key: "iasl",
        kind: "program",
        accepted: &[],
        doc: "The ACPI compiler, which acrn-dm runs for every guest; Debian has it in acpica-tools.",
    },
    OptionDoc {
        key: "cpu_affinity",
        kind: "array",
        accepted: &[],
        doc: "The local APIC ids of the processors that guests run on, one for each vCPU; needed for more than one, and none leaves it to ACRN's scenario.",
    },
    OptionDoc {
        key: "disk_slots",
        kind: "integer",
        accepted: &["0", "16"],
        doc: "How many empty disks a guest starts with at least; each takes one disk while the guest runs.",
    },
    OptionDoc {
        key: "extra_args",
        kind: "array",
        accepted: &[],
        doc: "Arguments that are added to acrn-dm's command line as they are.",
    },
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
