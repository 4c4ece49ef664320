//! The private containerd itself, proved with runc: what the other tests stand on.

use std::time::Duration;

use anyhow::Result;
use caisson_testbed::{BUSYBOX, Containerd, RUNC};

#[test]
fn a_container_of_runc_runs_and_leaves_nothing() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outcome = containerd.run_with(RUNC, &[], &["sh", "-c", "echo out; echo err >&2; exit 3"])?;
    assert_eq!((outcome.code, outcome.stdout_text().as_str(), outcome.stderr.as_str()), (3, "out\n", "err\n"));
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_container_that_still_runs_is_named_among_what_is_left() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.fresh_id();
    let session = containerd.prepare_with(RUNC, &[], BUSYBOX, &id, &["sh", "-c", "echo up; exec sleep 60"]).start()?;
    session.wait_for("up", Duration::from_secs(30))?;
    let left = containerd.leftovers()?.join("\n");
    for part in ["containerd-shim-runc-v2", "sleep 60", "mount ", "cgroup ", "file "] {
        assert!(left.contains(part), "no \"{part}\" in:\n{left}");
    }
    Ok(())
}

#[test]
fn nothing_of_a_dropped_containerd_remains() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let scope = containerd.scope().clone();
    let id = containerd.fresh_id();
    let ctr = containerd.ctr(&["run", "--detach", "--runtime", RUNC, BUSYBOX, &id, "sleep", "60"]);
    ctr.run()?.success()?;
    drop(containerd);
    assert!(scope.processes()?.is_empty());
    assert!(scope.cgroups()?.is_empty());
    assert!(!scope.dir().exists());
    Ok(())
}
