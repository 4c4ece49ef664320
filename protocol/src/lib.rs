//! What every caisson program shares: the wire contracts, ids, addresses, deadlines and status codes.
//!
//! Nothing here decides anything. A program that speaks these contracts can take the place of any of ours.

pub mod address;
pub mod id;
pub mod listen;
pub mod paths;
pub mod processes;
pub mod status;
pub mod stream;
pub mod sys;

use std::time::Duration;

/// containerd's own contracts: Task, Sandbox, events, types.
pub use containerd_shim_protos as containerd;

pub use generated::{config, config_ttrpc, guest, guest_ttrpc, runtimeoptions, sandbox, sandbox_ttrpc, vmm, vmm_ttrpc};

/// The context of a call that must be answered within `limit`.
pub fn deadline(limit: Duration) -> ttrpc::context::Context {
    ttrpc::context::with_duration(limit)
}

/// The context of a call that waits for as long as it takes: `Wait` and event streams only.
pub fn no_deadline() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(0)
}

#[allow(warnings, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}
