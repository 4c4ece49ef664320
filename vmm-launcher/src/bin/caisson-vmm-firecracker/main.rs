//! `caisson-vmm-firecracker`: the launcher for Firecracker, 1.10 or newer.
//!
//! This folder holds Firecracker's API and what it can do; everything else is in the library. Firecracker runs in the
//! library's jail, under its own seccomp filters.

mod api;
mod configuration;
mod disks;
mod firecracker;
mod layout;
mod log;
mod metrics;
mod options;
mod probe;
mod version;

use std::process::ExitCode;

use caisson_vmm_launcher::{cli, jail};

fn main() -> ExitCode {
    jail::obey().unwrap_or_else(cli::main::<firecracker::Firecracker>)
}
