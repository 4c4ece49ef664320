//! StratoVirt's own options.

use caisson_vmm_launcher::options::OptionDoc;
use serde::{Deserialize, Serialize};

/// The `[hypervisor.stratovirt]` table's own keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub seccomp: bool,
    pub extra_args: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { seccomp: true, extra_args: Vec::new() }
    }
}

/// The same keys for people.
pub const DOCS: &[OptionDoc] = &[
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
}
