//! The measurements as tables for people or as JSON for programs, each held against its budget.

use anyhow::{Context, Result};
use comfy_table::Table;
use serde::Serialize;

use crate::bench::{
    memory::{AGENT, Sizes},
    pod::Pod,
    run::Subject,
    stages::{Stages, median},
    table::table,
    work::Work,
};

const MB: f64 = 1_000_000.0;

/// What takes less is in the JSON only, in milliseconds.
const WORTH_A_LINE: f64 = 0.5;

const TOTAL: &str = "ctr run";

/// What a pod may take where one instruction is one nanosecond.
const INSTRUCTIONS: f64 = 500.0;
/// A launcher has this and its hypervisor's name.
const LAUNCHER: &str = "caisson-vmm-";

/// What caisson must keep to, on two cores without KVM: name of the measurement, limit, unit.
const BUDGETS: &[(&str, f64, &str)] = &[
    (TOTAL, 4000.0, "ms"),
    ("containerd-shim-caisson-v2", 6.0, "MB"),
    ("caisson-vmm-qemu", 6.0, "MB"),
    (AGENT, 6.0, "MB"),
    ("root file system", 12.0, "MB"),
];

/// Everything that one bench has found.
#[derive(Serialize)]
pub struct Report {
    hypervisor: String,
    machine_type: Option<String>,
    pods: usize,
    /// Of the pod that was not counted, in milliseconds.
    cold_total: f64,
    /// Medians in milliseconds.
    total: f64,
    /// Until the first byte of the container's output.
    first_output: f64,
    /// How long the machine's processors worked meanwhile, together.
    busy: f64,
    /// How long they had nothing to do.
    idle: f64,
    outside: Stages,
    start: Stages,
    end: Stages,
    /// Of a traced pod.
    work: Work,
    /// Proportional set sizes of an idle pod's processes, and the resident set of the agent in the guest, in bytes.
    memory: Sizes,
    /// Files that the guest boots from, in bytes.
    image: Sizes,
    budgets: Vec<Budget>,
}

/// What was measured of one hypervisor.
pub struct Measured {
    /// The pod that is not counted.
    pub first: Pod,
    /// Those that are.
    pub pods: Vec<Pod>,
    pub memory: Sizes,
    pub image: Sizes,
    pub work: Work,
}

/// A measurement and its limit.
#[derive(Serialize)]
struct Budget {
    name: &'static str,
    measured: Option<f64>,
    limit: f64,
    unit: &'static str,
    met: bool,
}

impl Report {
    /// Takes the medians.
    pub fn of(subject: &Subject, counts_instructions: bool, measured: Measured) -> Self {
        let Measured { first, pods, memory, image, work } = measured;
        let pods = &pods;
        let mut report = Self {
            hypervisor: subject.hypervisor.clone(),
            machine_type: subject.machine_type.clone(),
            pods: pods.len(),
            cold_total: first.total,
            total: of_pods(pods, |pod| pod.total),
            first_output: of_pods(pods, |pod| pod.first_output),
            busy: of_pods(pods, |pod| pod.busy),
            idle: of_pods(pods, |pod| pod.idle),
            outside: medians(pods, |pod| &pod.outside),
            start: medians(pods, |pod| &pod.start),
            end: medians(pods, |pod| &pod.end),
            work,
            memory,
            image,
            budgets: Vec::new(),
        };
        let concerns =
            |name: &str| name.strip_prefix(LAUNCHER).is_none_or(|hypervisor| hypervisor == report.hypervisor);
        let limit = |name: &str, limit: f64| if name == TOTAL && counts_instructions { INSTRUCTIONS } else { limit };
        let budgets = BUDGETS.iter().filter(|(name, ..)| concerns(name));
        report.budgets = budgets.map(|(name, most, unit)| report.judge(name, limit(name, *most), unit)).collect();
        report
    }

    /// For programs.
    pub fn print_json(&self) -> Result<()> {
        println!("{}", serde_json::to_string_pretty(self).context("write the report as JSON")?);
        Ok(())
    }

    /// Whose it is.
    fn name(&self) -> String {
        let machine = self.machine_type.as_deref().map(|name| format!(" {name}")).unwrap_or_default();
        format!("{}{machine}", self.hypervisor)
    }

    /// For people.
    pub fn print_tables(&self) -> Result<()> {
        let (name, pods, cold) = (self.name(), self.pods, self.cold_total);
        println!("\n{name}, median of {pods} warm pods; the cold one took {cold:.0} ms\n");
        let mut times = table(&["stage", "ms"]);
        times.add_row([TOTAL.to_owned(), format!("{:.1}", self.total)]);
        for (name, value) in [("first output", self.first_output), ("busy", self.busy), ("idle", self.idle)] {
            times.add_row([format!("- {name}"), format!("{value:.1}")]);
        }
        add_stages(&mut times, "- ", &self.outside);
        add_stages(&mut times, "shim, create: ", &self.start);
        add_stages(&mut times, "shim, end: ", &self.end);
        println!("{times}\n");

        if !self.work.is_empty() {
            let mut work = table(&["what the processors did", "ms"]);
            let mut parts: Vec<_> = self.work.iter().collect();
            parts.sort_by(|one, other| other.1.total_cmp(one.1));
            for (name, time) in parts.into_iter().filter(|(_, time)| **time >= WORTH_A_LINE) {
                work.add_row([name.clone(), format!("{time:.1}")]);
            }
            println!("{work}\n");
        }

        let mut sizes = table(&["size", "MB"]);
        for (name, bytes) in self.memory.iter().chain(&self.image) {
            sizes.add_row([name.clone(), format!("{:.2}", *bytes as f64 / MB)]);
        }
        println!("{sizes}\n");

        let mut budgets = table(&["budget", "measured", "limit", ""]);
        for budget in &self.budgets {
            let measured = budget.measured.map_or("-".to_owned(), |value| format!("{value:.1} {}", budget.unit));
            let limit = format!("{:.1} {}", budget.limit, budget.unit);
            let verdict = if budget.met { "met" } else { "missed" };
            budgets.add_row([budget.name, &measured, &limit, verdict]);
        }
        println!("{budgets}");
        Ok(())
    }

    /// What was not measured is missed.
    fn judge(&self, name: &'static str, limit: f64, unit: &'static str) -> Budget {
        let time = (name == TOTAL).then_some(self.total);
        let size = self.memory.get(name).or_else(|| self.image.get(name)).map(|bytes| *bytes as f64 / MB);
        let measured = time.or(size);
        Budget { name, measured, limit, unit, met: measured.is_some_and(|value| value <= limit) }
    }
}

/// The times of all of them side by side, in milliseconds, and the memory of their processes.
pub fn print_comparison(reports: &[Report]) {
    let names: Vec<String> = reports.iter().map(Report::name).collect();
    let header: Vec<&str> = ["ms"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let mut times = table(&header);
    let value = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    let mut add = |name: String, values: Vec<Option<f64>>| {
        times.add_row([name].into_iter().chain(values.into_iter().map(value)));
    };
    add(TOTAL.to_owned(), reports.iter().map(|report| Some(report.total)).collect());
    add("- first output".to_owned(), reports.iter().map(|report| Some(report.first_output)).collect());
    for (prefix, stages) in STAGES {
        for name in names_of(reports.iter().map(stages)) {
            let of = |report| stages(report).iter().find(|(stage, _)| *stage == name).map(|(_, value)| *value);
            add(format!("{prefix}{name}"), reports.iter().map(of).collect());
        }
    }
    println!("\n{times}\n");

    let mut sizes = table(&[&["MB"], &header[1..]].concat());
    let total = |report: &Report| {
        report.memory.iter().filter(|(name, _)| name.as_str() != AGENT).map(|(_, bytes)| bytes).sum::<u64>()
    };
    let row = reports.iter().map(|report| format!("{:.1}", total(report) as f64 / MB));
    sizes.add_row(["all processes of an idle pod on the host".to_owned()].into_iter().chain(row));
    println!("{sizes}");
}

/// One part of a report's stages.
type PartOf = fn(&Report) -> &Stages;

/// The parts of the comparison, each with how the names of its rows begin.
const STAGES: [(&str, PartOf); 3] = [
    ("- ", |report| &report.outside),
    ("shim, create: ", |report| &report.start),
    ("shim, end: ", |report| &report.end),
];

/// Each stage's name once, in the order of the first that has it.
fn names_of<'a>(all: impl Iterator<Item = &'a Stages>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for (name, _) in all.flatten() {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    names
}

fn of_pods(pods: &[Pod], value: fn(&Pod) -> f64) -> f64 {
    median(pods.iter().map(value)).unwrap_or_default()
}

/// The median of each stage, in the order of the first pod that has it.
fn medians(pods: &[Pod], stages: impl Fn(&Pod) -> &Stages) -> Stages {
    let names = names_of(pods.iter().map(&stages));
    let value = |name: String| {
        let values = pods.iter().flat_map(&stages).filter(|(stage, _)| *stage == name).map(|(_, value)| *value);
        let median = median(values)?;
        Some((name, median))
    };
    names.into_iter().filter_map(value).collect()
}

fn add_stages(table: &mut Table, prefix: &str, stages: &Stages) {
    for (name, milliseconds) in stages {
        table.add_row([format!("{prefix}{name}"), format!("{milliseconds:.1}")]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(start: &[(&str, f64)]) -> Pod {
        let start = start.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        Pod { total: 1.0, first_output: 1.0, busy: 1.0, idle: 0.0, outside: Stages::new(), start, end: Stages::new() }
    }

    #[test]
    fn each_stage_has_its_own_median_in_the_order_of_the_log() {
        let pods = [pod(&[("b", 1.0), ("a", 10.0)]), pod(&[("b", 3.0), ("a", 30.0)]), pod(&[("b", 2.0), ("a", 20.0)])];
        assert_eq!(medians(&pods, |pod| &pod.start), [("b".to_owned(), 2.0), ("a".to_owned(), 20.0)]);
    }

    #[test]
    fn a_stage_that_only_some_pods_have_is_not_lost() {
        let pods = [pod(&[("a", 1.0)]), pod(&[("a", 1.0), ("late", 5.0)])];
        assert_eq!(medians(&pods, |pod| &pod.start)[1], ("late".to_owned(), 5.0));
    }
}
