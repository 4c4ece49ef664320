//! `cargo xtask demo`: one container in a pod of its own, from nothing to nothing.

use anyhow::{Result, ensure};
use caisson_testbed::{Accelerator, CAISSON, Configuration, Containerd, Hypervisor, Installation};

use crate::step::{human, step};

const SCRIPT: &str = "echo \"hello from process $$ on $(uname -s) $(uname -r)\"; echo \"$(nproc) CPU, \
                      $(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB of memory\"";

/// Runs it and tells what happened.
pub fn run(installation: &Installation) -> Result<()> {
    let accelerator = Accelerator::find(&installation.programs)?;
    let name = if accelerator.is_kvm() { Hypervisor::BUILTIN } else { Hypervisor::QEMU };
    let configuration = Configuration::new(Hypervisor::named(name, installation), installation);
    let containerd = step("start a private containerd with the busybox image", || {
        Containerd::start_with(installation, &configuration)
    })?;
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;

    let command = ["sh", "-c", SCRIPT];
    let outcome = step(&format!("ctr run --rm --runtime {CAISSON} busybox sh -c '…'"), || {
        containerd.run(&[], &command)?.success()
    })?;
    for line in outcome.stdout_text().lines() {
        println!("    | {line}");
    }
    let guest = containerd.run(&[], &["uname", "-r"])?.success()?;
    println!();
    println!("    hypervisor    {name}, because {}", accelerator.reason);
    println!("    host kernel   {}", host.trim());
    println!("    guest kernel  {}", guest.stdout_text().trim());
    println!("    first output  {}", outcome.first_output.map_or("-".to_owned(), human));
    println!("    ctr run       {}", human(outcome.took));
    println!();

    let left = containerd.leftovers()?;
    ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    drop(containerd);
    println!("    nothing left behind: no process, mount, control group, socket or file");
    Ok(())
}
