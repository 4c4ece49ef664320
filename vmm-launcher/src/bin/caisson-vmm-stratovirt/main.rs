//! `caisson-vmm-stratovirt`: the launcher for StratoVirt.
//!
//! StratoVirt looks like QEMU and is not: this folder holds its arguments, its dialect of the machine protocol and the
//! slots that its microvm has for disks and network cards.

mod appear;
mod command_line;
#[cfg(test)]
mod fake;
mod options;
mod slots;
mod stratovirt;

use std::process::ExitCode;

fn main() -> ExitCode {
    caisson_vmm_launcher::cli::main::<stratovirt::StratoVirt>()
}
