//! What a container's first process finds: environment, directory, user, capabilities, root file system.

use anyhow::Result;
use caisson_testbed::{BUSYBOX_APP, CAISSON, Containerd, RUNC};

#[test]
fn the_environment_and_the_working_directory_are_as_asked_for() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let options = ["--env", "GREETING=hello world", "--cwd", "/tmp"];
    let outcome = containerd.run(&options, &["sh", "-c", "echo $GREETING; pwd"])?;
    assert_eq!(outcome.stdout_text(), "hello world\n/tmp\n");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn the_images_user_has_its_supplementary_groups_and_home() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let script = "id; pwd; touch /root/x 2>/dev/null || echo refused";
    let outcome = containerd.prepare(&[], BUSYBOX_APP, &containerd.fresh_id(), &["sh", "-c", script]).run()?;
    let user = "uid=1000(app) gid=1000(app) groups=1000(app),2000(data),2001(logs)";
    assert_eq!(outcome.stdout_text(), format!("{user}\n/home/app\nrefused\n"));
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_read_only_root_cannot_be_written() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outcome = containerd.run(&["--read-only"], &["touch", "/x"])?;
    assert_eq!((outcome.code, outcome.stderr.as_str()), (1, "touch: /x: Read-only file system\n"));
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn the_root_file_system_can_be_written() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outcome =
        containerd.run(&[], &["sh", "-c", "echo text > /etc/new && cat /etc/new && rm /etc/passwd && ls /etc"])?;
    assert_eq!(outcome.stdout_text(), "text\ngroup\nmotd\nnew\n");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn what_a_process_may_do_and_sees_is_the_same_as_with_runc() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    // Without /dev/core, and mounts below /proc and /sys, which hide what only some kernels have.
    let script = "env | sort; id; umask; ulimit -n; ls /dev | grep -v core; cat /proc/1/cmdline | tr '\\0' ' '; \
                  grep -E '^(Cap|NoNewPrivs|Groups|Seccomp:)' /proc/self/status; \
                  awk '$5 !~ \"^/(proc|sys)/\" { print $5 }' /proc/self/mountinfo | sort";
    let runc = containerd.run_with(RUNC, &[], &["sh", "-c", script])?.success()?;
    let outcome = containerd.run(&[], &["sh", "-c", script])?.success()?;
    assert_eq!(outcome.stdout_text(), runc.stdout_text());
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn what_the_kernel_tells_is_hidden_as_far_as_the_specification_says() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    // A small kernel has no /proc/kcore.
    let script =
        "cat /proc/kcore 2>/dev/null | wc -c; wc -c < /proc/keys; echo 1 > /proc/sys/kernel/panic || echo refused";
    let outcome = containerd.run_with(CAISSON, &[], &["sh", "-c", script])?;
    assert_eq!(outcome.stdout_text(), "0\n0\nrefused\n", "{}", outcome.stderr);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn the_kernel_is_the_guests() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let host = containerd.run_with(RUNC, &[], &["cat", "/proc/sys/kernel/random/boot_id"])?.success()?;
    let guest = containerd.run(&[], &["cat", "/proc/sys/kernel/random/boot_id"])?.success()?;
    assert_ne!(guest.stdout_text(), host.stdout_text());
    containerd.assert_nothing_left();
    Ok(())
}
