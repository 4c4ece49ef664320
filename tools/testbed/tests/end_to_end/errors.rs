//! What cannot start: one sentence for the user that names the cause, within its deadline, and nothing left.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use caisson_testbed::{Configuration, Containerd, Hypervisor, Installation, skip};

/// Far below the defaults: a test should not wait a minute to see a deadline kept.
const BOOT_LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_kernel_that_does_not_exist_is_named() -> Result<()> {
    refused("kernel", "/nonexistent/vmlinux", &["/nonexistent/vmlinux", "kernel"])
}

#[test]
fn an_initrd_that_does_not_exist_is_named() -> Result<()> {
    refused("initrd", "/nonexistent/initrd", &["/nonexistent/initrd", "initrd"])
}

#[test]
fn a_hypervisor_that_does_not_exist_is_named() -> Result<()> {
    if !has_a_program()? {
        return Ok(());
    }
    refused("path", "/nonexistent/qemu", &["/nonexistent/qemu", "path"])
}

#[test]
fn a_file_system_daemon_that_does_not_exist_is_named() -> Result<()> {
    refused("virtio_fs_daemon", "/nonexistent/virtiofsd", &["virtiofsd", "/nonexistent/virtiofsd", "virtio_fs_daemon"])
}

#[test]
fn a_kernel_that_is_none_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let kernel = write(dir.path(), "vmlinux", b"not a kernel")?;
    refused("kernel", &kernel, &[&kernel])
}

#[test]
fn a_hypervisor_that_is_another_program_is_named() -> Result<()> {
    if !has_a_program()? {
        return Ok(());
    }
    refused("path", "/bin/false", &["/bin/false"])
}

#[test]
fn an_unknown_key_is_named_with_its_file() -> Result<()> {
    refused("kernle", "/boot/vmlinuz", &["kernle", "configuration.toml"])
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_what_would_be_right() -> Result<()> {
    refused("default_memory", "much", &["default_memory", "number"])
}

#[test]
fn a_corrupt_initrd_shows_the_kernels_last_words() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let initrd = write(dir.path(), "initrd", b"this is no archive at all")?;
    refused("initrd", &initrd, &["Kernel panic"])
}

#[test]
fn a_guest_that_panics_shows_the_kernels_last_words() -> Result<()> {
    refused("kernel_params", "rdinit=/nonexistent init=/nonexistent", &["Kernel panic"])
}

#[test]
fn an_init_that_exits_shows_the_kernels_last_words() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let initrd = busybox_initrd(dir.path(), "exit 3")?;
    refused("initrd", &initrd, &["Attempted to kill init"])
}

#[test]
fn an_agent_that_never_calls_is_given_up_at_its_deadline() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let initrd = busybox_initrd(dir.path(), "echo the agent is not here; while :; do busybox sleep 3600; done")?;
    refused("initrd", &initrd, &["agent", "boot_timeout_ms"])
}

#[test]
fn a_guest_that_powers_off_at_once_is_told_apart_from_a_slow_one() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let initrd = busybox_initrd(dir.path(), "busybox poweroff -f")?;
    refused("initrd", &initrd, &["guest"])
}

#[test]
fn after_a_refusal_the_same_containerd_still_runs_containers() -> Result<()> {
    let installation = Installation::find()?;
    let containerd = Containerd::start(&installation)?;
    let wrong = Configuration::of_this_run(&installation).with_option("kernel", "/nonexistent/vmlinux");
    let wrong = containerd.write_configuration("wrong.toml", &wrong)?;
    let wrong = wrong.to_str().context("path")?;
    assert_ne!(containerd.run(&["--runtime-config-path", wrong], &["true"])?.code, 0);
    assert_eq!(containerd.run(&[], &["true"])?.code, 0);
    containerd.assert_nothing_left();
    Ok(())
}

/// Whether the hypervisor is a program of its own; says so when it is not.
fn has_a_program() -> Result<bool> {
    let hypervisor = Hypervisor::of_this_run(&Installation::find()?);
    if hypervisor.program().is_none() {
        skip(format!("{} is its launcher", hypervisor.name()));
    }
    Ok(hypervisor.program().is_some())
}

/// Runs a container with `key` of the hypervisor's table set to `value` and looks at what the user is told.
fn refused(key: &str, value: &str, parts: &[&str]) -> Result<()> {
    let installation = Installation::find()?;
    let limit = i64::try_from(BOOT_LIMIT.as_millis())?;
    let configuration =
        Configuration::of_this_run(&installation).with("runtime.boot_timeout_ms", limit).with_option(key, value);
    let containerd = Containerd::start_with(&installation, &configuration)?;
    let outcome = containerd.run(&[], &["true"])?;
    let told = &outcome.stderr;
    assert_eq!(outcome.code, 1, "{told}");
    for part in parts {
        assert!(told.contains(part), "no \"{part}\" in: {told}");
    }
    // The console's words, where there are any, come after the sentence.
    let sentence = told.split("; the console's last lines:").next().unwrap_or_default();
    assert_eq!(sentence.trim_end().lines().count(), 1, "more than a sentence: {told}");
    assert!(!sentence.contains("virtiofsd") || parts.contains(&"virtiofsd"), "a consequence, not the cause: {told}");
    assert!(outcome.took < BOOT_LIMIT + Duration::from_secs(10), "took {:?}: {told}", outcome.took);
    containerd.assert_nothing_left();
    Ok(())
}

/// An initial ramdisk whose first process is a shell with `script`.
fn busybox_initrd(dir: &Path, script: &str) -> Result<String> {
    let root = dir.join("root");
    for name in ["bin", "dev"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    let init = root.join("init");
    fs::write(&init, format!("#!/bin/busybox sh\nPATH=/bin\n{script}\n"))?;
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let archive = dir.join("initrd");
    let pack = format!("cd {} && find . | busybox cpio -o -H newc > {}", root.display(), archive.display());
    let output = std::process::Command::new("sh").args(["-c", &pack]).output()?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    text(archive)
}

fn write(dir: &Path, name: &str, content: &[u8]) -> Result<String> {
    let path = dir.join(name);
    fs::write(&path, content)?;
    text(path)
}

fn text(path: PathBuf) -> Result<String> {
    path.into_os_string().into_string().ok().context("the path is text")
}
