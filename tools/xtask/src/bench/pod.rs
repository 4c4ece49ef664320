//! One `ctr run --rm … true`, from outside and by the shim's own account.

use std::time::Duration;

use anyhow::{Context, Result};
use caisson_testbed::Containerd;

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
    /// What makes up the total, in order.
    pub outside: Stages,
    /// What the shim tells of the start.
    pub start: Stages,
    /// What the shim tells of the end.
    pub end: Stages,
}

/// Runs the `number`th pod of this containerd, counted from 1.
pub fn measure(containerd: &Containerd, number: usize) -> Result<Pod> {
    // The byte tells when the container ran; `true` itself would tell nothing.
    let outcome = containerd.run(&[], &["sh", "-c", "echo; exec true"])?.success()?;
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
    Ok(Pod { total, outside, start, end })
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
