//! The virtual machine that the configuration asks for.

use anyhow::Result;
use caisson_testbed::{CAISSON, Configuration, Containerd, Installation};

#[test]
fn it_has_as_many_cpus_and_as_much_memory_as_configured() -> Result<()> {
    let script = "nproc; awk '/MemTotal/ { print ($2 > 400000 && $2 <= 524288) }' /proc/meminfo";
    let wanted = |configuration: Configuration| {
        configuration.with("hypervisor.qemu.default_vcpus", 2).with("hypervisor.qemu.default_memory", 512)
    };
    assert_eq!(output(wanted, &[], script)?, "2\n1\n");
    Ok(())
}

#[test]
fn the_machine_with_pci_boots_too() -> Result<()> {
    let wanted = |configuration: Configuration| configuration.with("hypervisor.qemu.machine_type", "q35");
    assert_eq!(output(wanted, &[], "ls /sys/bus/pci/devices | head -n 1")?, "0000:00:00.0\n");
    Ok(())
}

#[test]
fn an_annotation_of_the_pod_is_not_obeyed_unless_the_configuration_allows_it() -> Result<()> {
    let annotation = "io.katacontainers.config.hypervisor.default_vcpus=2";
    assert_eq!(output(|configuration| configuration, &["--annotation", annotation], "nproc")?, "1\n");
    Ok(())
}

#[test]
fn a_seccomp_profile_is_in_force() -> Result<()> {
    let script = "grep -E '^Seccomp:' /proc/self/status; unshare -U true 2>/dev/null || echo refused";
    assert_eq!(output(|configuration| configuration, &["--seccomp"], script)?, "Seccomp:\t2\nrefused\n");
    Ok(())
}

/// What `script` prints in a container with `options`, in a virtual machine with a changed configuration.
fn output(change: impl Fn(Configuration) -> Configuration, options: &[&str], script: &str) -> Result<String> {
    let installation = Installation::find()?;
    let containerd = Containerd::start_with(&installation, &change(Configuration::for_qemu(&installation)))?;
    let outcome = containerd.run_with(CAISSON, options, &["sh", "-c", script])?.success()?;
    containerd.assert_nothing_left();
    Ok(outcome.stdout_text())
}
