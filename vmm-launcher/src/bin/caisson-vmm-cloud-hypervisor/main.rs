//! `caisson-vmm-cloud-hypervisor`: the launcher for Cloud Hypervisor.
//!
//! This folder holds Cloud Hypervisor's API and what it can do; everything else is in the library. Cloud Hypervisor runs
//! in the library's jail, under its own seccomp filters and, where the host has it, Landlock.

mod api;
mod cloud_hypervisor;
mod configuration;
mod events;
mod hotplug;
mod layout;
mod options;
mod probe;

use std::process::ExitCode;

use caisson_vmm_launcher::{cli, jail};

fn main() -> ExitCode {
    jail::obey().unwrap_or_else(cli::main::<cloud_hypervisor::CloudHypervisor>)
}
