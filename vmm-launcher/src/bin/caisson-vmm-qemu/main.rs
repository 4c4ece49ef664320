//! `caisson-vmm-qemu`: the launcher for QEMU.
//!
//! This folder holds QEMU's arguments, its machine protocol and what it can do; everything else is in the library.

mod abilities;
mod accelerator;
mod card;
mod command_line;
mod helpers;
mod hotplug;
mod kernel_params;
mod options;
mod probe;
mod qemu;
mod saved;
mod sizes;

#[cfg(test)]
mod fake;

use std::process::ExitCode;

fn main() -> ExitCode {
    caisson_vmm_launcher::cli::main::<qemu::Qemu>()
}
