//! Resource limits: set in the guest's control groups, and in force there.

use anyhow::Result;
use caisson_testbed::{CAISSON, Containerd};

/// Shows the container its own control group; `ctr` does not by itself.
const CGROUP: &str = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";

#[test]
fn a_memory_limit_is_set_and_a_process_over_it_is_killed() -> Result<()> {
    let options = ["--mount", CGROUP, "--memory-limit", "33554432"];
    let output = output(&options, "cat /sys/fs/cgroup/memory.max; tail /dev/zero; echo $?")?;
    assert_eq!(output, "33554432\n137\n");
    Ok(())
}

#[test]
fn a_cpu_limit_is_set_and_throttles() -> Result<()> {
    let work = "i=0; while [ $i -lt 10000 ]; do i=$((i + 1)); done";
    let script = format!("cat /sys/fs/cgroup/cpu.max; {work}; cat /sys/fs/cgroup/cpu.stat");
    let output = output(&["--mount", CGROUP, "--cpus", "0.2"], &script)?;
    assert!(output.starts_with("20000 100000\n"), "{output}");
    let throttled = output.lines().find_map(|line| line.strip_prefix("nr_throttled "));
    assert!(throttled.is_some_and(|count| count != "0"), "{output}");
    Ok(())
}

#[test]
fn cpu_shares_become_a_weight() -> Result<()> {
    // 10 ^ ((log2(512)^2 + 125 * log2(512)) / 612 - 7 / 34), rounded up: 1024 shares are a weight of 100, as in runc 1.4.
    assert_eq!(output(&["--mount", CGROUP, "--cpu-shares", "512"], "cat /sys/fs/cgroup/cpu.weight")?, "59\n");
    Ok(())
}

fn output(options: &[&str], script: &str) -> Result<String> {
    let containerd = Containerd::of_this_build()?;
    let outcome = containerd.run_with(CAISSON, options, &["sh", "-c", script])?.success()?;
    containerd.assert_nothing_left();
    Ok(outcome.stdout_text())
}
