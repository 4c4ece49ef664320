//! What a user asks of a hypervisor, and where its launcher's answer says so.

use serde::Serialize;

use crate::launcher::Capabilities;

/// One column of the list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Feature {
    /// As JSON has it.
    pub(crate) name: &'static str,
    /// The column's head.
    pub(crate) heading: &'static str,
    /// In a sentence.
    pub(crate) words: &'static str,
    /// Its name in [`Capabilities::missing`].
    key: &'static str,
    /// Whether no hypervisor has it without KVM.
    needs_kvm: bool,
    has: fn(&Capabilities) -> bool,
}

/// All of them, in the order of the columns.
pub(crate) const ALL: [Feature; 10] = [
    Feature {
        name: "file_sharing",
        heading: "FILES",
        words: "file sharing",
        key: "fs",
        needs_kvm: false,
        has: |told| has(&told.devices, "fs"),
    },
    Feature {
        name: "block_hotplug",
        heading: "BLOCK",
        words: "block hotplug",
        key: "block-hotplug",
        needs_kvm: false,
        has: |told| has(&told.hotplug, "block"),
    },
    Feature {
        name: "net_hotplug",
        heading: "NET",
        words: "network hotplug",
        key: "net-hotplug",
        needs_kvm: false,
        has: |told| has(&told.hotplug, "net"),
    },
    Feature {
        name: "cpu_hotplug",
        heading: "CPU",
        words: "CPU hotplug",
        key: "resize-vcpus",
        needs_kvm: false,
        has: |told| has(&told.operations, "resize-vcpus"),
    },
    Feature {
        name: "memory_hotplug",
        heading: "MEMORY",
        words: "memory hotplug",
        key: "resize-memory",
        needs_kvm: false,
        has: |told| has(&told.operations, "resize-memory"),
    },
    Feature {
        name: "snapshot",
        heading: "SNAPSHOT",
        words: "snapshot",
        key: "snapshot",
        needs_kvm: false,
        has: |told| has(&told.operations, "snapshot"),
    },
    Feature {
        name: "huge_pages",
        heading: "HUGEPAGES",
        words: "huge pages",
        key: "huge-pages",
        needs_kvm: false,
        has: |told| has(&told.features, "huge-pages"),
    },
    Feature {
        name: "vfio",
        heading: "VFIO",
        words: "VFIO and GPUs",
        key: "vfio",
        needs_kvm: true,
        has: |told| has(&told.devices, "vfio") || has(&told.hotplug, "vfio"),
    },
    Feature {
        name: "tdx",
        heading: "TDX",
        words: "TDX",
        key: "tdx",
        needs_kvm: true,
        has: |told| has(&told.confidential, "tdx"),
    },
    Feature {
        name: "sev_snp",
        heading: "SEV-SNP",
        words: "SEV-SNP",
        key: "sev-snp",
        needs_kvm: true,
        has: |told| has(&told.confidential, "sev-snp"),
    },
];

/// Whether a hypervisor has a feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Yes,
    /// And why not.
    No(String),
}

impl Feature {
    /// What `told` says of it.
    pub(crate) fn of(&self, told: &Capabilities) -> Answer {
        if (self.has)(told) {
            return Answer::Yes;
        }
        Answer::No(match told.missing.get(self.key) {
            Some(why) => why.clone(),
            None if self.needs_kvm && told.accelerator != "kvm" => format!("needs KVM; {}", told.accelerator_reason),
            None => "caisson does not offer it with this hypervisor".to_owned(),
        })
    }
}

fn has(list: &[String], word: &str) -> bool {
    list.iter().any(|entry| entry == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_feature_is_explained_in_the_launchers_words() {
        let told = Capabilities {
            devices: vec!["block".into()],
            missing: [("fs".to_owned(), "Firecracker has no such device".to_owned())].into(),
            ..Capabilities::default()
        };
        assert_eq!(ALL[0].of(&told), Answer::No("Firecracker has no such device".to_owned()));
    }

    #[test]
    fn without_kvm_that_is_the_reason_for_what_needs_it() {
        let told = Capabilities {
            accelerator: "tcg".into(),
            accelerator_reason: "there is no /dev/kvm".into(),
            ..Capabilities::default()
        };
        assert_eq!(ALL[8].of(&told), Answer::No("needs KVM; there is no /dev/kvm".to_owned()));
        assert_eq!(ALL[5].of(&told), Answer::No("caisson does not offer it with this hypervisor".to_owned()));
    }

    #[test]
    fn hotplug_is_not_the_same_as_having_the_device() {
        let told = Capabilities { devices: vec!["net".into()], hotplug: vec!["block".into()], ..Default::default() };
        let answers: Vec<_> = ALL.iter().map(|feature| feature.of(&told) == Answer::Yes).collect();
        assert_eq!(answers, [false, true, false, false, false, false, false, false, false, false]);
    }
}
