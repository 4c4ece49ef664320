//! The commands of `ctr tasks` on a container that runs in the background.

use anyhow::Result;
use caisson_testbed::{BUSYBOX, Containerd};

use crate::LIMIT;

/// Runs until it is told to end, and then says so.
const OBEDIENT: &str = "trap 'echo told; exit 3' TERM; echo up; while :; do sleep 600 & wait; done";

#[test]
fn exec_has_streams_and_an_exit_code_of_its_own() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let mut session = containerd.exec(&id, &["sh", "-c", "echo up; cat; echo err >&2; exit 7"]).start()?;
    session.wait_for("up", LIMIT)?;
    session.feed(b"through\n".to_vec());
    let outcome = session.wait(LIMIT)?;
    assert_eq!((outcome.code, outcome.stdout_text().as_str(), outcome.stderr.as_str()), (7, "up\nthrough\n", "err\n"));
    let outcome = containerd.exec(&id, &["cat", "/proc/1/comm"]).run()?;
    assert_eq!(outcome.stdout_text(), "sleep\n");
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn exec_on_a_terminal_has_one() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let exec_id = containerd.fresh_id();
    let exec = containerd.ctr(&["tasks", "exec", "--tty", "--exec-id", &exec_id, &id, "sh", "-c", "tty; read line"]);
    let mut session = exec.start_on_terminal(24, 80)?;
    session.wait_for("/dev/pts/0", LIMIT)?;
    session.write(b"\r")?;
    assert_eq!(session.wait(LIMIT)?.code, 0);
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn exec_of_a_missing_command_fails_and_the_container_goes_on() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let outcome = containerd.exec(&id, &["no-such-program"]).run()?;
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("no-such-program"), "{}", outcome.stderr);
    assert_eq!(containerd.exec(&id, &["true"]).run()?.code, 0);
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn kill_asks_the_container_to_end() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.fresh_id();
    let session = containerd.prepare(&[], BUSYBOX, &id, &["sh", "-c", OBEDIENT]).start()?;
    session.wait_for("up", LIMIT)?;
    containerd.ctr(&["tasks", "kill", &id]).run()?.success()?;
    let outcome = session.wait(LIMIT)?;
    assert_eq!((outcome.code, outcome.stdout_text().as_str()), (3, "up\ntold\n"));
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_running_container_is_listed_with_its_processes_and_gone_when_attach_ends() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    assert_eq!(state(&containerd, &id)?, "RUNNING");
    let processes = containerd.ctr(&["tasks", "ps", &id]).run()?.success()?.stdout_text();
    assert_eq!(processes.lines().count(), 2, "{processes}");

    // Waits for the container as its foreground would, and deletes the task at its end.
    let attached = containerd.ctr(&["tasks", "attach", &id]).start()?;
    containerd.ctr(&["tasks", "kill", "--signal", "KILL", &id]).run()?.success()?;
    assert_eq!(attached.wait(LIMIT)?.code, 137);
    assert_eq!(state(&containerd, &id)?, "");
    containerd.ctr(&["containers", "rm", &id]).run()?.success()?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_paused_container_says_so_and_goes_on_when_resumed() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    containerd.ctr(&["tasks", "pause", &id]).run()?.success()?;
    assert_eq!(state(&containerd, &id)?, "PAUSED");
    containerd.ctr(&["tasks", "resume", &id]).run()?.success()?;
    assert_eq!(state(&containerd, &id)?, "RUNNING");
    assert_eq!(containerd.exec(&id, &["echo", "on"]).run()?.stdout_text(), "on\n");
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn metrics_tell_the_memory_in_use() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&["--memory-limit", "67108864"], &["sleep", "600"])?;
    let metrics = containerd.ctr(&["tasks", "metrics", &id]).run()?.success()?.stdout_text();
    let usage = metrics.lines().find(|line| line.starts_with("memory.usage"));
    let usage = usage.and_then(|line| line.split_whitespace().last()).and_then(|value| value.parse::<u64>().ok());
    assert!(usage.is_some_and(|bytes| bytes > 0), "{metrics}");
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

/// As `ctr tasks ls` tells it; empty when there is no such task.
fn state(containerd: &Containerd, id: &str) -> Result<String> {
    let list = containerd.ctr(&["tasks", "ls"]).run()?.success()?.stdout_text();
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
    Ok(line.and_then(|line| line.split_whitespace().last()).unwrap_or_default().to_owned())
}
