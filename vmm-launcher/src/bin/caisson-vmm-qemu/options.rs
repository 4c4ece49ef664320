//! QEMU's own options.

use caisson_protocol::vmm::VmConfig;
use caisson_vmm_launcher::{
    Error, Result,
    block_driver::{BlockDriver, Bus},
    options::{Need, OptionDoc},
};
use serde::{Deserialize, Serialize};

/// The `[hypervisor.qemu]` table's own keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub block_device_driver: BlockDriver,
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
/// Eight on each of eight of PCI's 32 places; the VM is born with its host bridge, its chipset and its devices on the others.
const MAX_HOTPLUG_SLOTS: u8 = 64;

impl Default for Options {
    fn default() -> Self {
        Self {
            block_device_driver: BlockDriver::default(),
            machine_type: MachineType::default(),
            accel: Accel::default(),
            cpu_features: String::new(),
            seccomp_sandbox: SANDBOX.into(),
            hotplug_slots: HOTPLUG_SLOTS,
            extra_args: Vec::new(),
        }
    }
}

impl Options {
    /// With slots for the disks that are likely to come to `vm`, as far as there can be.
    ///
    /// # Errors
    /// When it is to have more than there can be.
    pub fn for_vm(self, vm: &VmConfig) -> Result<Self> {
        if self.hotplug_slots > MAX_HOTPLUG_SLOTS {
            let slots = self.hotplug_slots;
            return Err(Error::Invalid(format!("{slots} hotplug_slots cannot be had: 0 to {MAX_HOTPLUG_SLOTS}")));
        }
        let likely = vm.spare_disks.min(MAX_HOTPLUG_SLOTS.into()) as u8;
        Ok(Self { hotplug_slots: self.hotplug_slots.max(likely), ..self })
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    #[default]
    Microvm,
    Q35,
}

impl MachineType {
    /// What it has devices on.
    pub fn bus(self) -> Bus {
        match self {
            Self::Microvm => Bus::Mmio,
            Self::Q35 => Bus::Pci,
        }
    }

    /// QEMU's driver of the `device` that is on this bus.
    pub fn driver(self, device: &str) -> String {
        match self {
            Self::Microvm => format!("{device}-device"),
            Self::Q35 => format!("{device}-pci"),
        }
    }
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
    BlockDriver::DOC,
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
        accepted: &["0", "64"],
        doc: "How many devices q35 can take while it runs, or more if a pod may need them; microvm takes none.",
    },
    OptionDoc {
        key: "extra_args",
        kind: "array",
        accepted: &[],
        doc: "Arguments that are added to QEMU's command line as they are.",
    },
];

/// Which machine has which bus.
pub const NEEDS: &[Need] = &[
    Need { key: "block_device_driver", value: "virtio-blk-pci", needs: "machine_type", needed: "\"q35\"" },
    Need { key: "block_device_driver", value: "virtio-blk-mmio", needs: "machine_type", needed: "\"microvm\"" },
    Need { key: "block_device_driver", value: "virtio-mmio", needs: "machine_type", needed: "\"microvm\"" },
];

#[cfg(test)]
mod tests {
    use caisson_vmm_launcher::options::{discrepancies, parse};

    use super::*;

    #[test]
    fn what_is_documented_is_what_is_read() {
        assert_eq!(discrepancies::<Options>(DOCS), Vec::<String>::new());
    }

    #[test]
    fn a_machine_that_does_not_exist_is_refused_with_those_that_do() {
        let error = parse::<Options>("machine_type = \"pc\"").unwrap_err().to_string();
        assert!(error.contains("unknown variant `pc`, expected `microvm` or `q35`"), "{error}");
    }

    fn slots(configured: u8, spare_disks: u32) -> Result<u8> {
        let options = Options { hotplug_slots: configured, ..Default::default() };
        options.for_vm(&VmConfig { spare_disks, ..Default::default() }).map(|options| options.hotplug_slots)
    }

    #[test]
    fn a_vm_has_slots_for_the_disks_that_are_likely_to_come() {
        assert_eq!(
            [(4, 0), (4, 10), (12, 10), (4, 1000)]
                .map(|(configured, spare_disks)| slots(configured, spare_disks).unwrap()),
            [4, 10, 12, 64]
        );
    }

    #[test]
    fn more_slots_than_there_can_be_are_refused() {
        assert_eq!(slots(65, 0).unwrap_err().to_string(), "65 hotplug_slots cannot be had: 0 to 64");
    }
}
