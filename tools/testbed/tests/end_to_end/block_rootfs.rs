//! Root filesystems as disks, in a guest that sees no directory of the host: on containerd's ordinary snapshotter.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use anyhow::{Context, Result};
use caisson_testbed::{BUSYBOX, Configuration, Containerd, Installation};

use crate::{LIMIT, layered_image::LayeredImage};

const SANDBOX: &str = "io.kubernetes.cri.container-type=sandbox";
const CONTAINER: &str = "io.kubernetes.cri.container-type=container";
const LAYERED: &str = "caisson.test/layered:latest";

/// A machine that takes no device while it runs, and shares no directory.
fn on_disks(installation: &Installation, cache: &Path) -> Configuration {
    Configuration::of_this_run(installation)
        .without_option("virtio_fs_daemon")
        .with_option("shared_fs", "none")
        .with_option("layer_cache_path", cache.display().to_string())
}

/// A machine that takes disks while it runs.
fn with_hotplug(installation: &Installation, cache: &Path) -> Configuration {
    let configuration = on_disks(installation, cache);
    if configuration.hypervisor().name() == caisson_testbed::Hypervisor::QEMU {
        configuration.with_option("machine_type", "q35")
    } else {
        configuration
    }
}

fn start(configuration: impl Fn(&Installation, &Path) -> Configuration) -> Result<(Containerd, tempfile::TempDir)> {
    let (installation, cache) = (Installation::find()?, tempfile::tempdir()?);
    let containerd = Containerd::start_with(&installation, &configuration(&installation, cache.path()))?;
    Ok((containerd, cache))
}

fn images(cache: &Path) -> Result<usize> {
    let entries = fs::read_dir(cache)?.collect::<Result<Vec<_>, _>>()?;
    Ok(entries.iter().filter(|entry| entry.path().extension().is_some_and(|extension| extension == "erofs")).count())
}

fn read_only(host: &Path, container: &str) -> String {
    format!("type=bind,src={},dst={container},options=rbind:ro", host.display())
}

#[test]
fn a_container_runs_and_leaves_only_the_image_of_its_layer() -> Result<()> {
    let (containerd, cache) = start(on_disks)?;
    let script = "echo written > /root/file && cat /root/file /etc/motd; ls /bin/busybox";
    for _ in 0..2 {
        let outcome = containerd.run(&[], &["sh", "-c", script])?.success()?;
        assert_eq!(outcome.stdout_text(), "written\nhello\n/bin/busybox\n");
        containerd.assert_nothing_left();
    }
    assert_eq!(images(cache.path())?, 1);
    Ok(())
}

#[test]
fn what_is_written_goes_to_a_disk_where_the_configuration_says_so() -> Result<()> {
    let (containerd, cache) = start(|installation, cache| {
        on_disks(installation, cache).with_option("rootfs_writable", "disk").with_option("rootfs_disk_size", 1024)
    })?;
    // More than the guest has memory.
    let script = "dd if=/dev/zero of=/big bs=1M count=400 2>/dev/null && stat -c %s /big";
    let outcome = containerd.run(&[], &["sh", "-c", script])?.success()?;
    assert_eq!(outcome.stdout_text(), "419430400\n");
    containerd.assert_nothing_left();
    assert_eq!(fs::read_dir(cache.path().join("sandboxes"))?.count(), 0);
    Ok(())
}

#[test]
fn layers_hide_and_replace_what_is_below_them() -> Result<()> {
    let (containerd, cache) = start(on_disks)?;
    containerd.import(layered(4)?.path())?;
    let script = "cat /replaced /kept; ls /removed /emptied 2>&1; ls -A /emptied";
    let outcome = containerd.prepare(&[], LAYERED, &containerd.fresh_id(), &["sh", "-c", script]).run()?;
    let expected = "above\nbelow\nls: /removed: No such file or directory\n/emptied:\nnew\nnew\n";
    assert_eq!(outcome.stdout_text(), expected, "{}", outcome.stderr);
    containerd.assert_nothing_left();
    assert_eq!(images(cache.path())?, 4);
    Ok(())
}

#[test]
fn an_image_of_more_layers_than_disks_has_the_lowest_in_one() -> Result<()> {
    let (containerd, cache) =
        start(|installation, cache| on_disks(installation, cache).with_option("rootfs_max_disks", 2))?;
    containerd.import(layered(8)?.path())?;
    let script = "cat /replaced /kept /layer-4 /layer-7; ls /removed 2>&1; ls -A /emptied";
    let outcome = containerd.prepare(&[], LAYERED, &containerd.fresh_id(), &["sh", "-c", script]).run()?;
    let expected = "above\nbelow\n4\n7\nls: /removed: No such file or directory\nnew\n";
    assert_eq!(outcome.stdout_text(), expected, "{}", outcome.stderr);
    containerd.assert_nothing_left();
    assert_eq!(images(cache.path())?, 2);
    Ok(())
}

#[test]
fn containers_of_a_pod_bring_their_disks_when_they_come() -> Result<()> {
    let (containerd, _cache) = start(with_hotplug)?;
    containerd.import(layered(4)?.path())?;
    let pod = containerd.run_detached(&["--annotation", SANDBOX], &["sleep", "600"])?;
    let sandbox_id = format!("io.kubernetes.cri.sandbox-id={pod}");
    let member = ["--annotation", CONTAINER, "--annotation", &sandbox_id];

    let same = containerd.run_detached(&member, &["sleep", "600"])?;
    containerd.exec(&same, &["touch", "/only-here"]).run()?.success()?;
    assert_eq!(containerd.exec(&pod, &["ls", "/only-here"]).run()?.code, 1);
    let other = containerd.prepare(&member, LAYERED, &containerd.fresh_id(), &["cat", "/replaced"]).run()?;
    assert_eq!((other.code, other.stdout_text().as_str()), (0, "above\n"), "{}", other.stderr);
    // The slots that it had are free again.
    let again = containerd.prepare(&member, LAYERED, &containerd.fresh_id(), &["cat", "/kept"]).run()?;
    assert_eq!((again.code, again.stdout_text().as_str()), (0, "below\n"), "{}", again.stderr);

    containerd.remove(&same)?;
    containerd.remove(&pod)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_bound_file_is_copied_and_follows_the_hosts() -> Result<()> {
    let (containerd, _cache) = start(on_disks)?;
    let host = tempfile::tempdir()?;
    let file = host.path().join("resolv.conf");
    fs::write(&file, "nameserver 192.0.2.1\n")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640))?;
    let script = "echo $(stat -c %a /etc/resolv.conf) $(cat /etc/resolv.conf); \
                  until grep -q 192.0.2.2 /etc/resolv.conf; do sleep 0.1; done; cat /etc/resolv.conf";
    let mount = read_only(&file, "/etc/resolv.conf");
    let id = containerd.fresh_id();
    let session = containerd.prepare(&["--mount", &mount], BUSYBOX, &id, &["sh", "-c", script]).start()?;
    session.wait_for("640 nameserver 192.0.2.1", LIMIT)?;
    fs::write(&file, "nameserver 192.0.2.2\n")?;
    session.wait_for("nameserver 192.0.2.2", LIMIT)?;
    assert_eq!(session.wait(LIMIT)?.code, 0);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_bound_folder_that_is_written_atomically_is_never_seen_half() -> Result<()> {
    let (containerd, _cache) = start(on_disks)?;
    let host = tempfile::tempdir()?;
    // As the kubelet writes a ConfigMap.
    let write = |version: &str| -> Result<()> {
        fs::create_dir(host.path().join(version))?;
        fs::write(host.path().join(version).join("one"), version)?;
        fs::write(host.path().join(version).join("two"), version)?;
        std::os::unix::fs::symlink(version, host.path().join("..new"))?;
        Ok(fs::rename(host.path().join("..new"), host.path().join("..data"))?)
    };
    write("..1")?;
    std::os::unix::fs::symlink("..data/one", host.path().join("one"))?;
    std::os::unix::fs::symlink("..data/two", host.path().join("two"))?;
    let script = "cat /config/one /config/two; echo; \
                  until [ \"$(cat /config/one)\" = ..2 ]; do sleep 0.1; done; cat /config/one /config/two; echo";
    let mount = read_only(host.path(), "/config");
    let id = containerd.fresh_id();
    let session = containerd.prepare(&["--mount", &mount], BUSYBOX, &id, &["sh", "-c", script]).start()?;
    session.wait_for("..1..1", LIMIT)?;
    write("..2")?;
    fs::remove_dir_all(host.path().join("..1"))?;
    session.wait_for("..2..2", LIMIT)?;
    assert_eq!(session.wait(LIMIT)?.code, 0);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_large_bind_mount_is_refused_by_name_before_anything_starts() -> Result<()> {
    let (containerd, cache) = start(on_disks)?;
    let host = tempfile::tempdir()?;
    File::create(host.path().join("database"))?.set_len(64 << 20)?;
    let outcome = containerd.run(&["--mount", &read_only(host.path(), "/data")], &["true"])?;
    let begin = format!("mount {} at /data: ", host.path().display());
    assert!(outcome.stderr.contains(&begin) && outcome.stderr.contains("holds more than 1 MiB"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("shared_fs = \"virtio-fs\""), "{}", outcome.stderr);
    assert_eq!(images(cache.path())?, 0);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn what_a_killed_shim_left_of_its_disks_is_gone() -> Result<()> {
    let (containerd, cache) = start(|installation, cache| {
        on_disks(installation, cache).with_option("rootfs_writable", "disk").with_option("rootfs_disk_size", 64)
    })?;
    let script = ["sh", "-c", "echo up; exec sleep 600"];
    let session = containerd.prepare(&[], BUSYBOX, &containerd.fresh_id(), &script).start()?;
    session.wait_for("up", LIMIT)?;
    assert_eq!(fs::read_dir(cache.path().join("sandboxes"))?.count(), 1);
    for shim in containerd.scope().processes_named("containerd-shim-caisson-v2")? {
        caisson_testbed::kill(&shim, LIMIT)?;
    }
    session.wait(LIMIT)?;
    containerd.log().wait_for("cleaning up dead shim", LIMIT)?;
    containerd.assert_nothing_left();
    assert_eq!(fs::read_dir(cache.path().join("sandboxes"))?.count(), 0);
    Ok(())
}

/// Layers on top of busybox: the second hides and replaces what the first has, the others add a file each.
fn layered(layers: usize) -> Result<tempfile::NamedTempFile> {
    let mut image = LayeredImage::new(LAYERED);
    let busybox = fs::read("/bin/busybox").context("read /bin/busybox of the package busybox-static")?;
    let mut first = image.layer();
    first.program("bin/busybox", &busybox)?;
    for applet in ["sh", "cat", "ls"] {
        first.link(&format!("bin/{applet}"), "busybox")?;
    }
    for (name, text) in
        [("replaced", "below\n"), ("kept", "below\n"), ("removed", "below\n"), ("emptied/old", "below\n")]
    {
        first.file(name, text)?;
    }
    first.add()?;
    let mut second = image.layer();
    second.file("replaced", "above\n")?;
    // What OCI's image specification calls whiteouts.
    second.file(".wh.removed", "")?;
    second.file("emptied/.wh..wh..opq", "")?;
    second.file("emptied/new", "")?;
    second.add()?;
    for number in 2..layers {
        let mut layer = image.layer();
        layer.file(&format!("layer-{number}"), &format!("{number}\n"))?;
        layer.add()?;
    }
    image.archive()
}
