//! Firecracker's own options.

use caisson_vmm_launcher::options::OptionDoc;
use serde::{Deserialize, Serialize};

/// The `[hypervisor.firecracker]` table's own keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub spare_read_only_disks: u8,
    pub spare_writable_disks: u8,
    pub pci: bool,
    pub extra_args: Vec<String>,
}

/// With image, network, vsock, entropy and balloon there is room for 17 devices on x86-64's MMIO.
const SPARE_READ_ONLY_DISKS: u8 = 8;
const SPARE_WRITABLE_DISKS: u8 = 2;

impl Default for Options {
    fn default() -> Self {
        Self {
            spare_read_only_disks: SPARE_READ_ONLY_DISKS,
            spare_writable_disks: SPARE_WRITABLE_DISKS,
            pci: false,
            extra_args: Vec::new(),
        }
    }
}

/// The same keys for people.
pub const DOCS: &[OptionDoc] = &[
    OptionDoc {
        key: "spare_read_only_disks",
        kind: "integer",
        accepted: &["0", "255"],
        doc: "How many read-only disks the guest can be given while it runs; each is an empty disk until then.",
    },
    OptionDoc {
        key: "spare_writable_disks",
        kind: "integer",
        accepted: &["0", "255"],
        doc: "How many writable disks the guest can be given while it runs; each is an empty disk until then.",
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

#[cfg(test)]
mod tests {
    use caisson_vmm_launcher::options::{describe, parse};

    use super::*;

    #[test]
    fn the_documented_keys_are_the_keys_that_are_read() {
        let read = serde_json::to_value(Options::default()).unwrap();
        let mut read: Vec<_> = read.as_object().unwrap().keys().map(String::as_str).collect();
        let mut documented: Vec<_> = DOCS.iter().map(|doc| doc.key).collect();
        read.sort_unstable();
        documented.sort_unstable();
        assert_eq!(documented, read);
    }

    #[test]
    fn the_described_defaults_are_what_an_empty_table_gives() {
        let described: String = describe::<Options>(DOCS)
            .as_array()
            .unwrap()
            .iter()
            .map(|option| format!("{} = {}\n", option["key"].as_str().unwrap(), option["default"]))
            .collect();
        assert_eq!(parse::<Options>(&described).unwrap(), parse::<Options>("").unwrap());
    }
}
