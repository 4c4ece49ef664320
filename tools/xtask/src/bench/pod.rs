//! One `ctr run --rm … true`, from outside and by the shim's own account.

use std::time::Duration;

use anyhow::{Context, Result};
use caisson_testbed::Containerd;
use serde::Serialize;

use crate::bench::stages::{Stages, parse};

/// How late a shim may tell of its end.
const LOG_LIMIT: Duration = Duration::from_secs(10);

/// All durations in milliseconds.
#[derive(Debug, Serialize)]
pub struct Pod {
    /// From executing ctr to its end.
    pub total: f64,
    /// From executing ctr to the first byte of the container's output.
    pub first_output: f64,
    /// From that byte to ctr's end.
    pub after_output: f64,
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
    let first_output = outcome.first_output.context("the container said nothing")?;
    Ok(Pod {
        total: milliseconds(outcome.took),
        first_output: milliseconds(first_output),
        after_output: milliseconds(outcome.took.saturating_sub(first_output)),
        start: parse(&started),
        end: parse(&ended),
    })
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
