//! The hypervisors of the product: what is true of each on every machine.

use caisson_config_service::hypervisor;
use serde::Serialize;

/// One of them.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Known {
    /// As in configurations and in its launcher's name.
    pub(crate) name: &'static str,
    /// Processors that the hypervisor itself runs on.
    pub(crate) architectures: &'static [&'static str],
    /// Type 1 runs on the bare machine, type 2 in a host's kernel.
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    /// What one would choose it for.
    pub(crate) purpose: &'static str,
}

const KVM: &str = "2 (KVM)";

/// All of them, in the order of a list.
pub(crate) const ALL: [Known; 6] = [
    Known { name: "builtin", architectures: &["x86_64"], kind: KVM, purpose: "caisson's own: nothing else to install" },
    Known {
        name: "qemu",
        architectures: &["x86_64", "aarch64", "riscv64", "s390x", "ppc64le"],
        kind: "2 (KVM, or emulation)",
        purpose: "the most devices and machines; also runs where there is no KVM",
    },
    Known {
        name: "cloud-hypervisor",
        architectures: &["x86_64", "aarch64"],
        kind: KVM,
        purpose: "modern devices with hotplug, in memory-safe code",
    },
    Known {
        name: "firecracker",
        architectures: &["x86_64", "aarch64"],
        kind: KVM,
        purpose: "the smallest device model; no file sharing",
    },
    Known {
        name: "stratovirt",
        architectures: &["x86_64", "aarch64"],
        kind: KVM,
        purpose: "light machines on openEuler",
    },
    Known {
        name: "acrn",
        architectures: &["x86_64"],
        kind: "1",
        purpose: "embedded and real-time hosts that run ACRN",
    },
];

/// The one that is called `name`, in full or in short.
pub(crate) fn find(name: &str) -> Option<&'static Known> {
    ALL.iter().find(|known| known.name == hypervisor::canonical(name))
}

/// The other name of `name`; the same one where there is none.
pub(crate) fn short(name: &str) -> &str {
    let known = hypervisor::KNOWN.iter().find(|known| known.name == name);
    known.and_then(|known| known.synonym).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn these_are_the_hypervisors_that_configurations_know() {
        assert!(hypervisor::KNOWN.iter().all(|known| find(known.name).is_some()));
        assert_eq!(hypervisor::KNOWN.len(), ALL.len());
        assert_eq!(find("clh").unwrap().name, "cloud-hypervisor");
        assert_eq!(short("firecracker"), "fc");
    }
}
