//! StratoVirt's own options.

use caisson_vmm_launcher::{block_driver::BlockDriver, options::OptionDoc};
use serde::{Deserialize, Serialize};

/// The `[hypervisor.stratovirt]` table's own keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub block_device_driver: BlockDriver,
    pub seccomp: bool,
    pub extra_args: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { block_device_driver: BlockDriver::default(), seccomp: true, extra_args: Vec::new() }
    }
}

/// The same keys for people.
pub const DOCS: &[OptionDoc] = &[
    BlockDriver::MMIO_DOC,
    OptionDoc {
        key: "seccomp",
        kind: "bool",
        accepted: &[],
        doc: "Whether StratoVirt keeps itself from system calls that it does not need.",
    },
    OptionDoc {
        key: "extra_args",
        kind: "array",
        accepted: &[],
        doc: "Arguments that are added to StratoVirt's command line as they are.",
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
