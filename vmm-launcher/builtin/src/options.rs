//! The built-in VMM's own options.

use caisson_vmm_launcher::options::OptionDoc;
use serde::{Deserialize, Serialize};

/// The `[hypervisor.builtin]` table's own keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// See [`DOCS`].
    pub block_io: BlockIo,
    /// See [`DOCS`].
    pub file_server: FileServer,
    /// See [`DOCS`].
    pub seccomp: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { block_io: BlockIo::default(), file_server: FileServer::default(), seccomp: true }
    }
}

/// How a disk's image is read and written.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockIo {
    /// io_uring where the host has it, else a thread.
    #[default]
    Auto,
    /// A thread for each disk.
    Thread,
}

/// Who serves a shared directory.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FileServer {
    /// A process of its own, which is confined.
    #[default]
    Virtiofsd,
    /// This process.
    Builtin,
}

/// The same keys for people.
pub const DOCS: &[OptionDoc] = &[
    OptionDoc {
        key: "block_io",
        kind: "string",
        accepted: &["auto", "thread"],
        doc: "How disks are read and written: auto takes io_uring where the host has it, thread a thread for each disk.",
    },
    OptionDoc {
        key: "file_server",
        kind: "string",
        accepted: &["virtiofsd", "builtin"],
        doc: "Who serves shared directories: virtiofsd is a confined process for each, builtin is the VMM's own process.",
    },
    OptionDoc {
        key: "seccomp",
        kind: "bool",
        accepted: &[],
        doc: "Whether the VMM's threads are confined to the system calls that they need; another one ends the VM.",
    },
];

#[cfg(test)]
mod tests {
    use caisson_vmm_launcher::options::{describe, parse};

    use super::*;

    #[test]
    fn the_documented_keys_are_the_keys_that_are_read() {
        let read = serde_json::to_value(Options::default()).unwrap();
        let mut documented: Vec<_> = DOCS.iter().map(|doc| doc.key).collect();
        documented.sort_unstable();
        let mut read: Vec<_> = read.as_object().unwrap().keys().map(String::as_str).collect();
        read.sort_unstable();
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
