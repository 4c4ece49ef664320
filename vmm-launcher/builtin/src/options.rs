//! The built-in VMM's own options.

use caisson_vmm_launcher::{block_driver::BlockDriver, options::OptionDoc};
use serde::{Deserialize, Serialize};

/// The `[hypervisor.builtin]` table's own keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// See [`DOCS`].
    pub block_device_driver: BlockDriver,
    /// See [`DOCS`].
    pub block_io: BlockIo,
    /// See [`DOCS`].
    pub file_server: FileServer,
    /// See [`DOCS`].
    pub seccomp: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            block_device_driver: BlockDriver::default(),
            block_io: BlockIo::default(),
            file_server: FileServer::default(),
            seccomp: true,
        }
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
    BlockDriver::MMIO_DOC,
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
    use caisson_vmm_launcher::options::discrepancies;

    use super::*;

    #[test]
    fn what_is_documented_is_what_is_read() {
        assert_eq!(discrepancies::<Options>(DOCS), Vec::<String>::new());
    }
}
