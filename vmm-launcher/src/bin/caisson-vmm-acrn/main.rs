//! `caisson-vmm-acrn`: the launcher for ACRN.
//!
//! ACRN is a hypervisor below the host: the host is its Service VM, and `acrn-dm`, one process per guest, asks the hypervisor
//! for a VM and emulates its devices. This folder holds acrn-dm's arguments, its command monitor and its console.

mod acrn;
mod command_line;
mod monitor;
mod options;
mod probe;
mod pty;

use std::process::ExitCode;

fn main() -> ExitCode {
    caisson_vmm_launcher::cli::main::<acrn::Acrn>()
}
