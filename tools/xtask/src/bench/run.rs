//! `cargo xtask bench run`: a container's start and end, through containerd.

use anyhow::{Context, Result, ensure};
use caisson_testbed::{Configuration, Containerd, Hypervisor, Installation};

use super::{
    Place, memory, pod, report,
    report::{Measured, Report},
    work,
};

/// How to measure.
#[derive(clap::Args)]
pub struct Options {
    /// How many pods the medians are taken from
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Prints JSON instead of tables
    #[arg(long)]
    pub(super) json: bool,
    /// The hypervisor: qemu, builtin, or one whose launcher caisson has and whose program is in $CAISSON_HYPERVISORS; with
    /// its machine type, if it has several: qemu:q35. Several hypervisors, with commas, are measured one after the other
    #[arg(long, default_value = Hypervisor::QEMU, value_delimiter = ',')]
    hypervisor: Vec<Subject>,
    #[command(flatten)]
    pub(super) place: Place,
}

/// What is measured.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) hypervisor: String,
    pub(super) machine_type: Option<String>,
}

impl From<&str> for Subject {
    fn from(text: &str) -> Self {
        match text.split_once(':') {
            Some((hypervisor, machine_type)) => {
                Self { hypervisor: hypervisor.to_owned(), machine_type: Some(machine_type.to_owned()) }
            }
            None => Self { hypervisor: text.to_owned(), machine_type: None },
        }
    }
}

impl Subject {
    fn configured(&self, installation: &Installation) -> Hypervisor {
        let hypervisor = Hypervisor::named(&self.hypervisor, installation);
        match &self.machine_type {
            Some(machine_type) => hypervisor.with_option("machine_type", machine_type.as_str()),
            None => hypervisor,
        }
    }
}

/// Measures and prints.
pub fn run(installation: &Installation, options: &Options) -> Result<()> {
    let mut reports = Vec::new();
    for subject in &options.hypervisor {
        let report = measure(installation, options, subject).with_context(|| subject.hypervisor.clone())?;
        if options.json {
            report.print_json()?
        } else {
            report.print_tables()?
        }
        reports.push(report);
    }
    if reports.len() > 1 && !options.json {
        report::print_comparison(&reports);
    }
    Ok(())
}

fn measure(installation: &Installation, options: &Options, subject: &Subject) -> Result<Report> {
    let hypervisor = subject.configured(installation);
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

    Ok(Report::of(subject, options.place.prepared, Measured { first, pods, memory, image, work }))
}
