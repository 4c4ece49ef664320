//! Cloud Hypervisor's own options.

use caisson_vmm_launcher::options::OptionDoc;
use serde::{Deserialize, Serialize};

/// The `[hypervisor.cloud-hypervisor]` table's own keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
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
                parse::<Options>(&format!("{} = \"{value}\"", doc.key)).unwrap();
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
}
