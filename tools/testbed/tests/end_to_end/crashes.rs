//! A process of the sandbox dies: the user learns of it, and nothing stays behind.

use anyhow::{Result, ensure};
use caisson_testbed::{BUSYBOX, Containerd, Outcome, kill};

use crate::LIMIT;

const SHIM: &str = "containerd-shim-caisson-v2";

#[test]
fn a_killed_hypervisor_ends_the_container_with_255() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outcome = run_and_kill(&containerd, &containerd.hypervisor().process())?;
    assert_eq!(outcome.code, 255, "{}", outcome.stderr);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_killed_launcher_ends_the_container_with_255() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outcome = run_and_kill(&containerd, &format!("caisson-vmm-{}", containerd.hypervisor().name()))?;
    assert_eq!(outcome.code, 255, "{}", outcome.stderr);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn what_a_killed_shim_leaves_is_cleaned_up_by_containerd() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outcome = run_and_kill(&containerd, SHIM)?;
    assert_ne!(outcome.code, 0, "{}", outcome.stderr);
    // containerd executes the shim's `delete` once it has noticed.
    containerd.log().wait_for("cleaning up dead shim", LIMIT)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_killed_file_system_daemon_does_not_keep_the_container_from_being_removed() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    kill_all(&containerd, "virtiofsd")?;
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_container_outlives_containerd_and_is_its_successors() -> Result<()> {
    let mut containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    containerd.restart()?;
    assert_eq!(containerd.exec(&id, &["echo", "here"]).run()?.stdout_text(), "here\n");
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

/// Starts a container, kills a program of its sandbox, and waits for what `ctr run` makes of that.
fn run_and_kill(containerd: &Containerd, program: &str) -> Result<Outcome> {
    let id = containerd.fresh_id();
    let session = containerd.prepare(&[], BUSYBOX, &id, &["sh", "-c", "echo up; exec sleep 600"]).start()?;
    session.wait_for("up", LIMIT)?;
    kill_all(containerd, program)?;
    session.wait(LIMIT)
}

fn kill_all(containerd: &Containerd, program: &str) -> Result<()> {
    let processes = containerd.scope().processes_named(program)?;
    ensure!(!processes.is_empty(), "no process runs {program}");
    processes.iter().try_for_each(|process| kill(process, LIMIT))
}
