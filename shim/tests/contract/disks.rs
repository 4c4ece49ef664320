//! Root filesystems as disks, and bind mounts as copies: a guest that sees no directory of the host.

use std::{fs, time::Duration};

use caisson_protocol::{containerd::api::Mount, status::Code};
use serde_json::{Value, json};

use crate::pod::{Pod, Setup, bind, status};

fn on_disks<'a>() -> Setup<'a> {
    Setup { disks: true, ..Default::default() }
}

fn with_mount<'a>(source: &str, options: &[&str]) -> Setup<'a> {
    let mount: Value = json!({"destination": "/config", "type": "bind", "source": source, "options": options});
    Setup { mounts: json!([mount]), ..on_disks() }
}

#[tokio::test]
async fn a_container_on_disks_leaves_only_the_images_of_its_layers() {
    let pod = Pod::start_with("web", &["sh", "-c", "echo out; exit 42"], on_disks()).await;
    pod.create().await.unwrap();
    assert_eq!(
        pod.journal(),
        [
            "born with disk-0",
            "block serial:disk-0 at /run/caisson/layers/disk-0",
            "tmpfs  at /run/caisson/rootfs/web",
            "overlay  at /run/caisson/rootfs/web/root"
        ]
    );
    pod.start_container().await.unwrap();
    assert_eq!(pod.wait().await, 42);
    pod.delete().await.unwrap();
    assert_eq!(pod.stdout(), "out\n");
    pod.shutdown().await;
    pod.assert_nothing_left();
    let [image] = &pod.cached()[..] else { panic!("{:?}", pod.cached()) };
    assert!(image.ends_with(".erofs"), "{image}");
}

#[tokio::test]
async fn an_image_that_is_too_much_goes_with_the_sandbox_that_was_the_last_to_use_it() {
    let pod = Pod::start_with("small", &["true"], Setup { layer_cache_mib: 0, ..on_disks() }).await;
    pod.create().await.unwrap();
    assert_eq!(pod.cached().len(), 1);
    pod.shutdown_now().await;
    assert!(pod.cached().is_empty(), "{:?}", pod.cached());
}

#[tokio::test]
async fn a_further_container_brings_only_the_layers_that_the_machine_does_not_have() {
    let pod = Pod::start_with("pod", &["true"], on_disks()).await;
    pod.create().await.unwrap();
    pod.journal();
    pod.add("same", "layer").await.unwrap();
    assert_eq!(pod.journal(), ["tmpfs  at /run/caisson/rootfs/same", "overlay  at /run/caisson/rootfs/same/root"]);
    pod.add("other", "another-layer").await.unwrap();
    assert_eq!(pod.journal()[..2], ["attached disk-1", "block serial:disk-1 at /run/caisson/layers/disk-1"]);
    pod.remove("same").await.unwrap();
    pod.remove("other").await.unwrap();
    assert_eq!(pod.journal().last().unwrap(), "detached disk-1");
    pod.shutdown_now().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn where_no_disk_can_be_added_a_further_image_is_refused_and_the_same_one_is_not() {
    let setup = Setup { variables: &[("FAKE_HOTPLUG", "none")], ..on_disks() };
    let pod = Pod::start_with("fixed", &["true"], setup).await;
    pod.create().await.unwrap();
    pod.add("same", "layer").await.unwrap();
    let refused = status(pod.add("other", "another-layer").await);
    assert_eq!(refused.code, Code::UNIMPLEMENTED);
    assert!(refused.message.contains("not supported with fake; a container that comes later must"), "{refused}");
    pod.shutdown_now().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn what_a_snapshot_already_changed_is_a_disk_of_its_own() {
    let pod = Pod::start_with("changed", &["true"], on_disks()).await;
    fs::create_dir(pod.file("changes")).unwrap();
    fs::write(pod.file("changes/file"), "kept").unwrap();
    let options = vec![format!("lowerdir={}", pod.file("layer")), format!("upperdir={}", pod.file("changes"))];
    let overlay = Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Default::default() };
    pod.create_on(overlay).await.unwrap();
    assert_eq!(pod.journal()[..2], ["born with disk-0", "born with disk-1"]);
    assert_eq!(pod.cached().len(), 2, "the layer's image, and the sandbox's own folder");
    pod.shutdown_now().await;
    pod.assert_nothing_left();
    assert_eq!(fs::read_dir(pod.file("cache/sandboxes")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_a_killed_shim_leaves_of_its_disks_is_removed_by_delete() {
    let pod = Pod::start_with("orphan", &["sleep", "1000"], on_disks()).await;
    fs::write(pod.file("layer/file"), "the container's own").unwrap();
    pod.create_on(bind(&pod.file("layer"), "rw")).await.unwrap();
    assert_eq!(fs::read_dir(pod.file("cache/sandboxes")).unwrap().count(), 1);
    pod.kill_shim();
    pod.run_delete(Duration::from_secs(20));
    pod.assert_nothing_left();
    assert_eq!(fs::read_dir(pod.file("cache/sandboxes")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_root_filesystem_of_another_kind_is_refused_with_what_would_do() {
    let pod = Pod::start_with("devmapper", &["true"], on_disks()).await;
    let mount = Mount { type_: "ext4".into(), source: "/dev/dm-0".into(), ..Default::default() };
    let refused = status(pod.create_on(mount).await);
    assert!(refused.message.contains("its type is ext4; containerd's snapshotter must be overlayfs"), "{refused}");
    pod.shutdown().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn a_copied_folder_follows_the_hosts() {
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("key"), "one").unwrap();
    let setup = with_mount(host.path().to_str().unwrap(), &["rbind", "ro"]);
    let pod = Pod::start_with("config", &["true"], setup).await;
    pod.create().await.unwrap();
    assert!(pod.journal().contains(&"REGULAR_FILE shared/config/mounts/0/key one".to_owned()));
    fs::write(host.path().join("key"), "two").unwrap();
    pod.journal_says("REGULAR_FILE shared/config/mounts/0/key two").await;
    fs::create_dir(host.path().join("deep")).unwrap();
    fs::write(host.path().join("deep/new"), "three").unwrap();
    pod.journal_says("REGULAR_FILE shared/config/mounts/0/deep/new three").await;
    fs::remove_file(host.path().join("key")).unwrap();
    pod.journal_says("NOTHING shared/config/mounts/0/key ").await;
    pod.shutdown_now().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn a_file_whose_name_another_takes_is_copied_again() {
    let host = tempfile::tempdir().unwrap();
    let file = host.path().join("resolv.conf");
    fs::write(&file, "one").unwrap();
    let setup = with_mount(file.to_str().unwrap(), &["rbind", "ro"]);
    let pod = Pod::start_with("dns", &["true"], setup).await;
    pod.create().await.unwrap();
    fs::write(host.path().join("new"), "two").unwrap();
    fs::rename(host.path().join("new"), &file).unwrap();
    pod.journal_says("REGULAR_FILE shared/dns/mounts/0 two").await;
    fs::write(&file, "three").unwrap();
    pod.journal_says("REGULAR_FILE shared/dns/mounts/0 three").await;
    pod.shutdown_now().await;
}

#[tokio::test]
async fn a_copy_that_failed_is_made_again_without_another_change() {
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("key"), "one").unwrap();
    let setup = with_mount(host.path().to_str().unwrap(), &["rbind", "ro"]);
    let pod = Pod::start_with("again", &["true"], Setup { variables: &[("FAKE_REFUSES", "two")], ..setup }).await;
    pod.create().await.unwrap();
    fs::write(host.path().join("key"), "two").unwrap();
    pod.journal_says("refused shared/again/mounts/0/key").await;
    pod.journal_says("REGULAR_FILE shared/again/mounts/0/key two").await;
    pod.shutdown_now().await;
}

#[tokio::test]
async fn a_container_whose_copies_cannot_be_made_leaves_none_in_the_guest() {
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("key"), "one").unwrap();
    let setup = with_mount(host.path().to_str().unwrap(), &["rbind", "ro"]);
    let pod = Pod::start_with("half", &["true"], Setup { variables: &[("FAKE_REFUSES", "one")], ..setup }).await;
    let refused = status(pod.create().await);
    assert!(refused.message.contains("copy a file of the host into the guest: the guest has no room"), "{refused}");
    assert_eq!(pod.journal().last().unwrap(), "NOTHING shared/half ");
    pod.shutdown().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn a_mount_that_cannot_be_copied_is_refused_before_anything_starts() {
    let host = tempfile::tempdir().unwrap();
    let large = host.path().join("large");
    fs::File::create(&large).unwrap().set_len(2 << 20).unwrap();
    let setup = with_mount(host.path().to_str().unwrap(), &["rbind", "ro"]);
    let pod = Pod::start_with("large", &["true"], setup).await;
    let refused = status(pod.create().await);
    let begin = format!("mount {} at /config: {} holds more than 1 MiB;", host.path().display(), large.display());
    assert!(refused.message.starts_with(&begin), "{refused}");
    assert_eq!((refused.code, pod.journal()), (Code::UNIMPLEMENTED, Vec::new()));
    assert!(pod.cached().is_empty());
    pod.shutdown().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn a_mount_that_is_written_to_is_refused_before_anything_starts() {
    let host = tempfile::tempdir().unwrap();
    let setup = with_mount(host.path().to_str().unwrap(), &["rbind", "rw"]);
    let pod = Pod::start_with("written", &["true"], setup).await;
    let refused = status(pod.create().await);
    assert!(refused.message.contains("what is written to a copy does not come back"), "{refused}");
    pod.shutdown().await;
    pod.assert_nothing_left();
}
