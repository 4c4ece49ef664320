//! `cargo xtask bench run`: a container's start and end, through containerd.

use anyhow::{Context, Result, ensure};
use caisson_testbed::{Configuration, Containerd, Hypervisor, Installation};

use super::{Place, memory, pod, report::Report, work};

/// How to measure.
#[derive(clap::Args)]
pub struct Options {
    /// How many pods the medians are taken from
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Prints JSON instead of tables
    #[arg(long)]
    pub(super) json: bool,
    /// The hypervisor: qemu, builtin, or one whose launcher caisson has and whose program is in $CAISSON_HYPERVISORS
    #[arg(long, default_value = Hypervisor::QEMU)]
    pub(super) hypervisor: String,
    /// The hypervisor's machine type
    #[arg(long)]
    pub(super) machine_type: Option<String>,
    #[command(flatten)]
    pub(super) place: Place,
}

/// Measures and prints.
pub fn run(installation: &Installation, options: &Options) -> Result<()> {
    let mut hypervisor = Hypervisor::named(&options.hypervisor, installation);
    if let Some(machine_type) = &options.machine_type {
        hypervisor = hypervisor.with_option("machine_type", machine_type.as_str());
    }
    let containerd = Containerd::start_with(installation, &Configuration::new(hypervisor, installation))?;

    let mut pods = Vec::new();
    for number in 0..=options.count as usize {
        let name = if number == 0 { "the first pod, which is not counted".to_owned() } else { format!("pod {number}") };
        eprintln!("    {name}");
        pods.push(pod::measure(&containerd, number + 1).context(name)?);
    }
    let first = pods.remove(0);
    // Only with a tracer and the right to use it.
    let work =
        work::measure(&containerd).inspect_err(|error| eprintln!("    not traced: {error:#}")).unwrap_or_default();
    let memory = memory::measure(&containerd)?;
    let image = memory::guest_image(installation)?;
    let left = containerd.leftovers()?;
    ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));

    let report = Report::of(options, &first, &pods, memory, image, work);
    if options.json { report.print_json() } else { report.print_tables() }
}
