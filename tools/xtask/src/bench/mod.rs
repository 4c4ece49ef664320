//! `cargo xtask bench`: how long a pod takes and what it costs, against the budgets.

mod memory;
mod pod;
mod report;
mod stages;

use anyhow::{Context, Result, ensure};
use caisson_testbed::{Configuration, Containerd, Installation};

use report::Report;

/// What can be measured.
#[derive(clap::Subcommand)]
pub enum Command {
    /// `ctr run --rm … true`, warm: stages, totals, memory
    Run(Options),
}

/// How to measure.
#[derive(clap::Args)]
pub struct Options {
    /// How many pods the medians are taken from
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Prints JSON instead of tables
    #[arg(long)]
    json: bool,
    /// The hypervisor
    #[arg(long, default_value = "qemu", value_parser = ["qemu"])]
    hypervisor: String,
    /// The hypervisor's machine type
    #[arg(long)]
    machine_type: Option<String>,
}

/// Measures and prints.
pub fn run(installation: &Installation, command: &Command) -> Result<()> {
    let Command::Run(options) = command;
    let mut configuration = Configuration::for_qemu(installation);
    if let Some(machine_type) = &options.machine_type {
        configuration = configuration.with("hypervisor.qemu.machine_type", machine_type.as_str());
    }
    let containerd = Containerd::start_with(installation, &configuration)?;

    let mut pods = Vec::new();
    for number in 0..=options.count as usize {
        let name = if number == 0 { "the first pod, which is not counted".to_owned() } else { format!("pod {number}") };
        eprintln!("    {name}");
        pods.push(pod::measure(&containerd, number + 1).context(name)?);
    }
    let first = pods.remove(0);
    let memory = memory::measure(&containerd)?;
    let image = memory::guest_image(installation)?;
    let left = containerd.leftovers()?;
    ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));

    let report = Report::of(options, &first, &pods, memory, image);
    if options.json { report.print_json() } else { report.print_tables() }
}
