//! QEMU's own options.

use caisson_vmm_launcher::options::OptionDoc;
use serde::{Deserialize, Serialize};

/// The `[hypervisor.qemu]` table's own keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub machine_type: MachineType,
    pub accel: Accel,
    pub cpu_features: String,
    pub seccomp_sandbox: String,
    pub hotplug_slots: u8,
    pub extra_args: Vec<String>,
}

/// The fewest privileges that QEMU can do with when everything it needs is opened by name or inherited.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// Each costs the guest a little time at boot.
const HOTPLUG_SLOTS: u8 = 4;

impl Default for Options {
    fn default() -> Self {
        Self {
            machine_type: MachineType::default(),
            accel: Accel::default(),
            cpu_features: String::new(),
            seccomp_sandbox: SANDBOX.into(),
            hotplug_slots: HOTPLUG_SLOTS,
            extra_args: Vec::new(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    #[default]
    Microvm,
    Q35,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    #[default]
    Auto,
    Kvm,
    Tcg,
}

/// The same keys for people.
pub const DOCS: &[OptionDoc] = &[
    OptionDoc {
        key: "machine_type",
        kind: "string",
        accepted: &["microvm", "q35"],
        doc: "The emulated machine: microvm starts fastest, q35 has PCI and takes devices while it runs.",
    },
    OptionDoc {
        key: "accel",
        kind: "string",
        accepted: &["auto", "kvm", "tcg"],
        doc: "How guest code runs: auto takes KVM when it really runs guests on this machine, else emulation (TCG).",
    },
    OptionDoc {
        key: "cpu_features",
        kind: "string",
        accepted: &[],
        doc: "Processor features to add or remove, as QEMU's -cpu takes them: \"-avx512f,+svm\".",
    },
    OptionDoc {
        key: "seccomp_sandbox",
        kind: "string",
        accepted: &[],
        doc: "QEMU's -sandbox argument, which keeps QEMU from system calls that it does not need; \"off\" allows all.",
    },
    OptionDoc {
        key: "hotplug_slots",
        kind: "integer",
        accepted: &["0", "255"],
        doc: "How many devices q35 can take while it runs; microvm takes none.",
    },
    OptionDoc {
        key: "extra_args",
        kind: "array",
        accepted: &[],
        doc: "Arguments that are added to QEMU's command line as they are.",
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
    fn every_accepted_value_is_read() {
        for doc in DOCS {
            for value in doc.accepted {
                let quote = if doc.kind == "integer" { "" } else { "\"" };
                parse::<Options>(&format!("{} = {quote}{value}{quote}", doc.key)).unwrap();
            }
        }
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

    #[test]
    fn a_machine_that_does_not_exist_is_refused_with_those_that_do() {
        let error = parse::<Options>("machine_type = \"pc\"").unwrap_err().to_string();
        assert!(error.contains("unknown variant `pc`, expected `microvm` or `q35`"), "{error}");
    }
}
