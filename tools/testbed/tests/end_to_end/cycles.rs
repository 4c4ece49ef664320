//! Pods one after the other: what one leaves behind, a host has thousands of after a week.

use std::{collections::BTreeSet, env, fs};

use anyhow::{Context, Result};
use caisson_testbed::Containerd;

/// How many pods; a run that has the time asks for more.
const CYCLES: &str = "TESTBED_CYCLES";
const DEFAULT_CYCLES: usize = 10;
/// Descriptors that containerd opens on the way, or closes late, however many pods there were.
const SLACK: usize = 5;

#[test]
fn pods_that_come_and_go_leak_nothing() -> Result<()> {
    let cycles = env::var(CYCLES).map_or(Ok(DEFAULT_CYCLES), |text| text.parse()).context(CYCLES)?;
    let containerd = Containerd::of_this_build()?;
    // The first pods start what stays: the config-service, containerd's connections.
    run(&containerd, 2)?;
    let (descriptors, interfaces) = (descriptors(&containerd)?, interfaces()?);
    run(&containerd, cycles)?;
    containerd.assert_nothing_left();
    let after = self::descriptors(&containerd)?;
    assert!(after <= descriptors + SLACK, "{descriptors} descriptors before, {after} after {cycles} pods");
    assert_eq!(self::interfaces()?, interfaces);
    Ok(())
}

fn run(containerd: &Containerd, count: usize) -> Result<()> {
    (0..count).try_for_each(|number| {
        let outcome = containerd.run(&[], &["true"])?.success();
        outcome.map(drop).with_context(|| format!("pod {number}"))
    })
}

/// Of the processes that outlive a pod.
fn descriptors(containerd: &Containerd) -> Result<usize> {
    let mut count = 0;
    for name in ["containerd", "caisson-config-service"] {
        for process in containerd.scope().processes_named(name)? {
            count += process.fd_count().with_context(|| format!("count the descriptors of {name}"))?;
        }
    }
    Ok(count)
}

fn interfaces() -> Result<BTreeSet<String>> {
    let entries = fs::read_dir("/sys/class/net").context("list the network interfaces")?;
    Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}
