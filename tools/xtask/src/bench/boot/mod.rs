//! `cargo xtask bench boot`: hypervisors side by side, each with the same kernel, initrd, memory and processor.

mod guest;
mod hypervisor;
mod report;
mod timing;
mod trace;

use std::fs;

use anyhow::{Context, Result, ensure};
use caisson_testbed::{Accelerator, Installation};

use self::{guest::Guest, hypervisor::Candidate, report::Report};
use super::Place;

/// How to measure.
#[derive(clap::Args)]
pub struct Options {
    /// How many boots the median is taken from
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// The guest's memory in MiB
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(64..))]
    memory_mib: u64,
    /// Boots Debian's kernel instead of image-builder's own
    #[arg(long)]
    debian_kernel: bool,
    /// Only these, by name
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Prints JSON instead of tables
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Measures and prints.
pub fn run(installation: &Installation, options: &Options) -> Result<()> {
    let accelerator = Accelerator::find(&installation.programs)?;
    ensure!(accelerator.is_kvm(), "this takes KVM ({}); add --icount to measure in a test host", accelerator.reason);
    let folder = tempfile::tempdir().context("make a folder")?;
    let guest = Guest::make(installation, folder.path(), options)?;
    let mut boots = Vec::new();
    for candidate in Candidate::all(installation, &guest, folder.path())? {
        if options.only.is_empty() || options.only.contains(&candidate.name) {
            eprintln!("    {}", candidate.name);
            let boot = measure(&candidate, options).with_context(|| format!("measure {}", candidate.name));
            match boot {
                Ok(boot) => boots.push(boot),
                Err(error) => eprintln!("    not measured: {error:#}"),
            }
        }
    }
    let report = Report::of(boots, fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(), options);
    if options.json { report.print_json() } else { report.print_tables() }
}

fn measure(candidate: &Candidate, options: &Options) -> Result<report::Boot> {
    // The first one brings the files into the page cache.
    let cold = timing::boot(candidate, options.memory_mib)?;
    let warm = (0..options.count).map(|_| timing::boot(candidate, options.memory_mib)).collect::<Result<Vec<_>>>()?;
    let trace = trace::boot(candidate)?;
    Ok(report::Boot::of(&candidate.name, &cold, &warm, trace))
}
