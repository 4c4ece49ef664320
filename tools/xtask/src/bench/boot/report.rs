//! The boots side by side.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    Options,
    hypervisor::OURS,
    timing::Timing,
    trace::{Exits, Trace},
};
use crate::bench::{stages::median, table::table};

const MB: f64 = 1_000_000.0;
/// Kinds of exits that take less are left out of the table, in milliseconds.
const WORTH_A_LINE: f64 = 1.0;

/// One hypervisor's. Times in milliseconds, sizes in bytes.
#[derive(Serialize)]
pub struct Boot {
    name: String,
    /// With cold files.
    cold: f64,
    /// The median of the others.
    exec_to_init: f64,
    /// Of the traced boot.
    set_up: f64,
    /// Likewise.
    guest: f64,
    /// Likewise.
    exits: BTreeMap<String, Exits>,
    system_calls: u64,
    outside_guest: u64,
    proportional: u64,
}

impl Boot {
    /// Takes the medians.
    pub fn of(name: &str, cold: &Timing, warm: &[Timing], trace: Trace) -> Self {
        let bytes =
            |of: fn(&Timing) -> u64| median(warm.iter().map(|timing| of(timing) as f64)).unwrap_or_default() as u64;
        Self {
            name: name.to_owned(),
            cold: milliseconds(cold.exec_to_init),
            exec_to_init: median(warm.iter().map(|timing| milliseconds(timing.exec_to_init))).unwrap_or_default(),
            set_up: trace.set_up,
            guest: trace.guest,
            exits: trace.exits,
            system_calls: trace.system_calls,
            outside_guest: bytes(|timing| timing.outside_guest),
            proportional: bytes(|timing| timing.proportional),
        }
    }

    fn in_exits(&self) -> Exits {
        let mut all = Exits::default();
        for exits in self.exits.values() {
            all.count += exits.count;
            all.time += exits.time;
        }
        all
    }
}

/// All of them.
#[derive(Serialize)]
pub struct Report {
    /// Of the host.
    host_kernel: String,
    /// `image-builder` or `debian`.
    guest_kernel: &'static str,
    memory_mib: u64,
    boots: Vec<Boot>,
    /// Of each boot's time to caisson's own, by name.
    ratios: BTreeMap<String, f64>,
}

impl Report {
    /// Holds each against caisson's own, if that was measured.
    pub fn of(boots: Vec<Boot>, host_kernel: &str, options: &Options) -> Self {
        let ours = boots.iter().find(|boot| boot.name == OURS).map(|boot| boot.exec_to_init);
        let ratio = |boot: &Boot| Some((boot.name.clone(), boot.exec_to_init / ours?));
        Self {
            host_kernel: host_kernel.to_owned(),
            guest_kernel: if options.debian_kernel { "debian" } else { "image-builder" },
            memory_mib: options.memory_mib,
            ratios: boots.iter().filter_map(ratio).collect(),
            boots,
        }
    }

    /// For programs.
    pub fn print_json(&self) -> Result<()> {
        println!("{}", serde_json::to_string_pretty(self).context("write the report as JSON")?);
        Ok(())
    }

    /// For people.
    pub fn print_tables(&self) -> Result<()> {
        let Self { host_kernel, guest_kernel, memory_mib, .. } = self;
        println!("\nguest kernel: {guest_kernel}, {memory_mib} MiB, 1 CPU; host kernel: {host_kernel}\n");
        let mut times = table(&["exec to init", "ms", "ratio", "cold ms", "MB outside guest", "PSS MB"]);
        for boot in &self.boots {
            let ratio = self.ratios.get(&boot.name).map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
            let sizes = [boot.outside_guest, boot.proportional].map(|bytes| format!("{:.1}", bytes as f64 / MB));
            let [outside, proportional] = sizes;
            let times_of = [boot.exec_to_init, boot.cold].map(|time| format!("{time:.1}"));
            let [time, cold] = times_of;
            times.add_row([boot.name.clone(), time, ratio, cold, outside, proportional]);
        }
        println!("{times}\n");

        let mut parts = table(&["traced boot", "set-up ms", "guest ms", "exits ms", "exits", "system calls"]);
        for boot in &self.boots {
            let exits = boot.in_exits();
            let times = [boot.set_up, boot.guest, exits.time].map(|time| format!("{time:.1}"));
            let [set_up, guest, in_exits] = times;
            let (count, calls) = (exits.count.to_string(), boot.system_calls.to_string());
            parts.add_row([boot.name.clone(), set_up, guest, in_exits, count, calls]);
        }
        println!("{parts}\n");

        let mut exits = table(&["exits", "reason", "count", "ms"]);
        for boot in &self.boots {
            let mut reasons: Vec<_> = boot.exits.iter().collect();
            reasons.sort_by(|one, other| other.1.time.total_cmp(&one.1.time));
            // The rest is in the JSON.
            for (reason, Exits { count, time }) in reasons.into_iter().filter(|(_, exits)| exits.time >= WORTH_A_LINE) {
                exits.add_row([boot.name.clone(), reason.clone(), count.to_string(), format!("{time:.1}")]);
            }
        }
        println!("{exits}");
        Ok(())
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
