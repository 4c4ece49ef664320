//! How a container's end reaches the user: exit codes, and errors for what cannot be executed.

use anyhow::Result;
use caisson_testbed::{BUSYBOX, Containerd};

use crate::LIMIT;

#[test]
fn exit_codes_are_those_of_the_container() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    assert_eq!(containerd.run(&[], &["true"])?.code, 0);
    assert_eq!(containerd.run(&[], &["false"])?.code, 1);
    assert_eq!(containerd.run(&[], &["sh", "-c", "exit 42"])?.code, 42);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_shell_tells_missing_from_not_executable() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let script = "no-such-program 2>/dev/null; echo $?; /etc/motd 2>/dev/null; echo $?";
    assert_eq!(containerd.run(&[], &["sh", "-c", script])?.stdout_text(), "127\n126\n");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_killed_container_exits_with_137() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.fresh_id();
    let session = containerd.prepare(&[], BUSYBOX, &id, &["sh", "-c", "echo up; exec sleep 600"]).start()?;
    session.wait_for("up", LIMIT)?;
    containerd.ctr(&["tasks", "kill", "--signal", "SIGKILL", &id]).run()?.success()?;
    assert_eq!(session.wait(LIMIT)?.code, 137);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_missing_command_is_named_and_exits_with_127() -> Result<()> {
    assert_not_executed("no-such-program", 127)
}

#[test]
fn a_command_that_is_not_executable_is_named_and_exits_with_126() -> Result<()> {
    assert_not_executed("/etc/motd", 126)
}

/// runc refuses to create such a container, which `ctr` turns into 1; a shell's codes tell more.
fn assert_not_executed(command: &str, code: i32) -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outcome = containerd.run(&[], &[command])?;
    assert_eq!(outcome.code, code, "{}", outcome.stderr);
    assert!(outcome.stderr.contains(command), "{}", outcome.stderr);
    assert_eq!(outcome.stderr.trim_end().lines().count(), 1, "{}", outcome.stderr);
    containerd.assert_nothing_left();
    Ok(())
}
