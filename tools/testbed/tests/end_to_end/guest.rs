//! The virtual machine that the configuration asks for.

use anyhow::Result;
use caisson_testbed::{CAISSON, Configuration, Containerd, Hypervisor, Installation};

#[test]
fn qemus_machine_with_pci_boots_too() -> Result<()> {
    if Hypervisor::of_this_run(&Installation::find()?).name() != Hypervisor::QEMU {
        return Ok(());
    }
    let wanted = |configuration: Configuration| configuration.with_option("machine_type", "q35");
    assert_eq!(output(wanted, &[], "ls /sys/bus/pci/devices | head -n 1")?, "0000:00:00.0\n");
    Ok(())
}

#[test]
fn a_seccomp_profile_is_in_force() -> Result<()> {
    let script = "grep -E '^Seccomp:' /proc/self/status; unshare -U true 2>/dev/null || echo refused";
    assert_eq!(output(|configuration| configuration, &["--seccomp"], script)?, "Seccomp:\t2\nrefused\n");
    Ok(())
}

#[test]
fn a_guest_may_have_its_root_on_a_disk() -> Result<()> {
    let installation = Installation::find()?;
    let image = installation.guest.initrd.with_file_name("rootfs.erofs");
    let hypervisor = Hypervisor::of_this_run(&installation).with_root_disk(&image);
    let containerd = Containerd::start_with(&installation, &Configuration::new(hypervisor, &installation))?;
    let parameters = containerd.run(&[], &["cat", "/proc/cmdline"])?.success()?.stdout_text();
    assert!(parameters.contains(" root=/dev/vda "), "{parameters}");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_container_runs_on_debians_kernel_as_it_is() -> Result<()> {
    let installation = Installation::find()?;
    let hypervisor = Hypervisor::of_this_run(&installation).with_guest(&installation.debian_guest);
    let containerd = Containerd::start_with(&installation, &Configuration::new(hypervisor, &installation))?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let release = containerd.exec(&id, &["uname", "-r"]).run()?.success()?.stdout_text();
    assert!(release.contains("cloud"), "{release}");
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

/// What `script` prints in a container with `options`, in a virtual machine with a changed configuration.
fn output(change: impl Fn(Configuration) -> Configuration, options: &[&str], script: &str) -> Result<String> {
    let installation = Installation::find()?;
    let containerd = Containerd::start_with(&installation, &change(Configuration::of_this_run(&installation)))?;
    let outcome = containerd.run_with(CAISSON, options, &["sh", "-c", script])?.success()?;
    containerd.assert_nothing_left();
    Ok(outcome.stdout_text())
}
