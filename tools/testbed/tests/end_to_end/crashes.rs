//! A process of the sandbox dies: the user learns of it, and nothing stays behind.

use anyhow::{Context, Result, ensure};
use caisson_testbed::{BUSYBOX, Containerd, Hypervisor, Installation, Outcome, kill};
use procfs::process::Process;
use rustix::process::{Pid, Signal, kill_process};

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

/// Where the launcher is the virtual machine, both end.
#[test]
fn a_killed_launcher_is_replaced_and_the_container_goes_on() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    if containerd.hypervisor().name() == Hypervisor::BUILTIN {
        let outcome = run_and_kill(&containerd, &format!("caisson-vmm-{}", Hypervisor::BUILTIN))?;
        assert_eq!(outcome.code, 255, "{}", outcome.stderr);
        containerd.assert_nothing_left();
        return Ok(());
    }
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    kill(&launcher(&containerd)?, LIMIT)?;

    // The guest is not asked by way of the launcher.
    assert_eq!(containerd.exec(&id, &["echo", "here"]).run()?.stdout_text(), "here\n");
    containerd.log().wait_for("another one goes on", LIMIT)?;
    assert_eq!(containerd.exec(&id, &["echo", "still"]).run()?.stdout_text(), "still\n");
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_hypervisor_that_is_killed_under_its_second_launcher_ends_the_container_with_255() -> Result<()> {
    if Hypervisor::of_this_run(&Installation::find()?).name() == Hypervisor::BUILTIN {
        return Ok(());
    }
    let containerd = Containerd::of_this_build()?;
    let id = containerd.fresh_id();
    let session = containerd.prepare(&[], BUSYBOX, &id, &["sh", "-c", "echo up; exec sleep 600"]).start()?;
    session.wait_for("up", LIMIT)?;
    kill(&launcher(&containerd)?, LIMIT)?;
    containerd.log().wait_for("another one goes on", LIMIT)?;
    kill_all(&containerd, &containerd.hypervisor().process())?;
    let outcome = session.wait(LIMIT)?;
    assert_eq!(outcome.code, 255, "{}", outcome.stderr);
    containerd.log().wait_for("was killed by SIGKILL", LIMIT)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_shim_lets_the_dead_of_its_lost_launcher_go() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    if containerd.hypervisor().name() == Hypervisor::BUILTIN {
        return Ok(());
    }
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    kill(&launcher(&containerd)?, LIMIT)?;
    containerd.log().wait_for("another one goes on", LIMIT)?;
    kill_all(&containerd, &containerd.hypervisor().process())?;
    containerd.log().wait_for("the virtual machine ended", LIMIT)?;
    for shim in containerd.scope().processes_named(SHIM)? {
        let dead: Vec<_> = procfs::process::all_processes()?
            .filter_map(|process| process.ok()?.stat().ok())
            .filter(|process| process.ppid == shim.pid && process.state == 'Z')
            .collect();
        ensure!(dead.is_empty(), "the shim waits for none of {dead:?}");
    }
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn what_a_killed_shim_and_its_killed_launcher_leave_is_cleaned_up_by_containerd() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.fresh_id();
    let session = containerd.prepare(&[], BUSYBOX, &id, &["sh", "-c", "echo up; exec sleep 600"]).start()?;
    session.wait_for("up", LIMIT)?;
    // Stopped, so that it does not hear of its launcher's end before its own.
    let shims = containerd.scope().processes_named(SHIM)?;
    for shim in &shims {
        kill_process(Pid::from_raw(shim.pid).context("a shim without a number")?, Signal::STOP)?;
    }
    kill(&launcher(&containerd)?, LIMIT)?;
    shims.iter().try_for_each(|shim| kill(shim, LIMIT))?;
    assert_ne!(session.wait(LIMIT)?.code, 0);
    containerd.log().wait_for("cleaning up dead shim", LIMIT)?;
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

/// Not what it has started of its own program to serve a device.
fn launcher(containerd: &Containerd) -> Result<Process> {
    let mut launchers =
        containerd.scope().processes_named(&format!("caisson-vmm-{}", containerd.hypervisor().name()))?;
    launchers.retain(|process| process.cmdline().is_ok_and(|line| line.get(1).is_some_and(|word| word == "serve")));
    launchers.pop().context("no launcher runs")
}

fn kill_all(containerd: &Containerd, program: &str) -> Result<()> {
    let processes = containerd.scope().processes_named(program)?;
    ensure!(!processes.is_empty(), "no process runs {program}");
    processes.iter().try_for_each(|process| kill(process, LIMIT))
}
