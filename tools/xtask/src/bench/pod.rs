//! One `ctr run --rm … true`, from outside and by the shim's own account.

use std::time::Duration;

use anyhow::{Context, Result};
use caisson_testbed::Containerd;
use procfs::{CurrentSI, KernelStats};

use crate::bench::stages::{Stages, parse};

/// How late a shim may tell of its end.
const LOG_LIMIT: Duration = Duration::from_secs(10);

/// Names that begin so are parts of other stages.
const PART: &str = "of_";

/// All durations in milliseconds.
#[derive(Debug)]
pub struct Pod {
    /// From executing ctr to its end.
    pub total: f64,
    /// From executing ctr to the first byte of output.
    pub first_output: f64,
    /// What all processors of the machine did meanwhile.
    pub busy: f64,
    /// Likewise, waiting for storage included.
    pub idle: f64,
    /// What makes up the total, in order.
    pub outside: Stages,
    /// What the shim tells of the start.
    pub start: Stages,
    /// What the shim tells of the end.
    pub end: Stages,
}

/// Runs the `number`th pod of this containerd, counted from 1.
pub fn measure(containerd: &Containerd, number: usize) -> Result<Pod> {
    let before = Processors::now()?;
    // A tiny static program, whose output tells when it ran.
    let outcome = containerd.run(&[], &["echo"])?.success()?;
    let used = Processors::now()?.since(&before);
    let started = containerd.log().wait_for_nth("sandbox started", number, LOG_LIMIT)?;
    let ended = containerd.log().wait_for_nth("sandbox ended", number, LOG_LIMIT)?;

    let (start, end) = (parse(&started.text), parse(&ended.text));
    let total = milliseconds(outcome.took);
    let first_output = milliseconds(outcome.first_output.context("the container said nothing")?);
    let sandbox_started = milliseconds(started.at - outcome.started);
    let sandbox_ended = milliseconds(ended.at - outcome.started);
    let create: f64 = start.iter().filter(|(name, _)| !name.starts_with(PART)).map(|(_, value)| value).sum();
    let outside = [
        ("ctr, containerd, shim's start", sandbox_started - create),
        ("shim: create", create),
        ("container's start to its first output", first_output - sandbox_started),
        ("its end to the sandbox's", sandbox_ended - first_output),
        ("containerd, ctr", total - sandbox_ended),
    ];
    let outside = outside.map(|(name, value)| (name.to_owned(), value)).to_vec();
    Ok(Pod { total, first_output, busy: used.busy, idle: used.idle, outside, start, end })
}

/// What the machine's processors have done so far, in milliseconds; counted in the kernel's ticks.
struct Processors {
    busy: f64,
    idle: f64,
}

impl Processors {
    fn now() -> Result<Self> {
        let total = KernelStats::current().context("read /proc/stat")?.total;
        let idle = total.idle_ms() + total.iowait_ms().unwrap_or_default();
        let irq = total.irq_ms().unwrap_or_default() + total.softirq_ms().unwrap_or_default();
        let busy = total.user_ms() + total.nice_ms() + total.system_ms() + irq;
        Ok(Self { busy: busy as f64, idle: idle as f64 })
    }

    fn since(&self, before: &Self) -> Self {
        Self { busy: self.busy - before.busy, idle: self.idle - before.idle }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
