//! Virtual machines from small to large.

use anyhow::{Context, Result};
use caisson_testbed::{Configuration, Containerd, Installation, skip};
use procfs::{Current, Meminfo};

#[test]
fn a_small_one_has_one_cpu_and_128_mib() -> Result<()> {
    has(1, 128)
}

#[test]
fn one_with_two_cpus_and_512_mib_has_them() -> Result<()> {
    has(2, 512)
}

#[test]
fn one_with_eight_cpus_has_them() -> Result<()> {
    has(8, 512)
}

#[test]
fn a_large_one_has_8_gib() -> Result<()> {
    let (wanted, machine) = (8 << 30, Meminfo::current().context("read the machine's memory")?.mem_total);
    if machine < wanted {
        skip(format!("this machine has {} MiB itself", machine >> 20));
        return Ok(());
    }
    has(2, 8192)
}

/// Starts a pod of that size and lets it count.
fn has(cpus: i64, memory_mib: i64) -> Result<()> {
    let installation = Installation::find()?;
    let configuration = Configuration::of_this_run(&installation)
        .with_option("default_vcpus", cpus)
        .with_option("default_memory", memory_mib);
    let containerd = Containerd::start_with(&installation, &configuration)?;
    let script = "nproc; awk '/MemTotal/ { print $2 }' /proc/meminfo";
    let outcome = containerd.run(&[], &["sh", "-c", script])?.success()?;
    let output = outcome.stdout_text();
    let (found_cpus, found_kib) = output.trim().split_once('\n').context("two lines")?;
    assert_eq!(found_cpus, cpus.to_string());
    // The kernel takes some for itself: its image, and a page table of all pages.
    let found_mib = found_kib.parse::<i64>()? / 1024;
    let own_mib = 60 + memory_mib / 32;
    assert!((memory_mib - own_mib..=memory_mib).contains(&found_mib), "{found_mib} MiB of {memory_mib}");
    containerd.assert_nothing_left();
    Ok(())
}
