//! Serves the `Vmm` contract (`protocol/proto/vmm.proto`) for one hypervisor per binary.
//!
//! ```text
//!  shim ──ttrpc──► service ──► Vm<H>: the state machine ──► H: Hypervisor, mechanics only
//!                                                            └ process, console, virtiofsd, vsock: shared parts
//! ```
//!
//! A backend is one file or folder under `src/bin/`: it implements [`hypervisor::Hypervisor`] and calls [`cli::main`].
//! It holds no state checks; [`vm::Vm`] has them all.

pub mod cli;
pub mod hypervisor;
pub mod vm;

pub mod options;
pub mod request;

pub mod ability;
pub mod appear;
pub mod ask;
pub mod balloon;
pub mod block_driver;
pub mod console;
pub mod guest_vsock;
pub mod http_api;
pub mod huge_pages;
pub mod jail;
pub mod kernel;
pub mod kvm;
pub mod metrics;
pub mod outlive;
pub mod process;
pub mod qmp;
pub mod size;
pub mod snapshot;
pub mod sockets;
pub mod tail;
pub mod tap;
pub mod time_stamp;
pub mod vfio;
pub mod virtiofsd;
pub mod vsock;

mod descriptors;
mod error;
mod run;
mod serve;
mod service;
mod sys;

#[cfg(test)]
#[path = "../tests/fakes/receive.rs"]
mod receive;

pub use error::{Error, Result};
