//! Bind mounts: the host's directories and files in the container.

use std::fs;

use anyhow::Result;
use caisson_testbed::Containerd;

#[test]
fn a_bound_directory_is_seen_and_written_from_both_sides() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let host = tempfile::tempdir()?;
    fs::write(host.path().join("from-host"), "host\n")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", host.path().display());
    let script = "cat /data/from-host; echo guest > /data/from-guest; mkdir /data/dir";
    let outcome = containerd.run(&["--mount", &mount], &["sh", "-c", script])?.success()?;
    assert_eq!(outcome.stdout_text(), "host\n");
    assert_eq!(fs::read_to_string(host.path().join("from-guest"))?, "guest\n");
    assert!(host.path().join("dir").is_dir());
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_read_only_bind_mount_cannot_be_written() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let host = tempfile::tempdir()?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:ro", host.path().display());
    let outcome = containerd.run(&["--mount", &mount], &["touch", "/data/x"])?;
    assert_eq!((outcome.code, outcome.stderr.as_str()), (1, "touch: /data/x: Read-only file system\n"));
    assert_eq!(fs::read_dir(host.path())?.count(), 0);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_single_file_can_be_bound() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let host = tempfile::NamedTempFile::new()?;
    fs::write(host.path(), "nameserver 192.0.2.1\n")?;
    let mount = format!("type=bind,src={},dst=/etc/resolv.conf,options=rbind:ro", host.path().display());
    let outcome = containerd.run(&["--mount", &mount], &["cat", "/etc/resolv.conf"])?.success()?;
    assert_eq!(outcome.stdout_text(), "nameserver 192.0.2.1\n");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_tmpfs_is_a_tmpfs() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let mount = "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1m";
    let script = "awk '$2 == \"/scratch\" { print $3 }' /proc/mounts; dd if=/dev/zero of=/scratch/x bs=1M count=1; \
                  dd if=/dev/zero of=/scratch/y bs=1k count=1 || echo full";
    let outcome = containerd.run(&["--mount", mount], &["sh", "-c", script])?.success()?;
    assert_eq!(outcome.stdout_text(), "tmpfs\nfull\n");
    containerd.assert_nothing_left();
    Ok(())
}
