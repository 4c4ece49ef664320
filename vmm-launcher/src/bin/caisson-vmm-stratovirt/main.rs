//! `caisson-vmm-stratovirt`: the launcher for StratoVirt.
//!
//! StratoVirt looks like QEMU and is not: this folder holds its arguments, its dialect of the machine protocol and the
//! slots that its microvm has for disks and network cards.

mod command_line;
#[cfg(test)]
mod fake;
mod options;
mod probe;
mod slots;
mod stratovirt;

use std::process::ExitCode;

use caisson_vmm_launcher::{cli, jail};

fn main() -> ExitCode {
    jail::obey().unwrap_or_else(cli::main::<stratovirt::StratoVirt>)
}
