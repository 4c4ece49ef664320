//! Cloud Hypervisor's own options.

use caisson_vmm_launcher::{block_driver::BlockDriver, options::OptionDoc};
use serde::{Deserialize, Serialize};

/// The `[hypervisor.cloud-hypervisor]` table's own keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub block_device_driver: BlockDriver,
    pub landlock: Landlock,
    pub shared_memory: bool,
    pub extra_args: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Landlock {
    #[default]
    Auto,
    On,
    Off,
}

/// The same keys for people.
pub const DOCS: &[OptionDoc] = &[
    BlockDriver::PCI_DOC,
    OptionDoc {
        key: "landlock",
        kind: "string",
        accepted: &["auto", "on", "off"],
        doc: "Whether Landlock confines Cloud Hypervisor to its VM's files a second time, after the launcher's jail: auto \
              does where the kernel has it (Linux 6.2 or newer).",
    },
    OptionDoc {
        key: "shared_memory",
        kind: "bool",
        accepted: &[],
        doc: "Whether the guest's memory can be shared with file servers that are attached later; with one from the start \
              it always can.",
    },
    OptionDoc {
        key: "extra_args",
        kind: "array",
        accepted: &[],
        doc: "Arguments that are added to Cloud Hypervisor's command line as they are.",
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
