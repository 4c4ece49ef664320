//! The shim as containerd drives it, with fakes for its neighbours: containerd's event service and the config-service
//! in this process, launcher and guest in `examples/caisson-vmm-fake.rs`.

mod disks;
mod pod;

use std::time::Duration;

use caisson_protocol::status::Code;
use pod::{Pod, Setup, status};

#[tokio::test]
async fn a_container_runs_from_create_to_shutdown_and_leaves_nothing() {
    let pod = Pod::start("web", &["sh", "-c", "echo out; echo err >&2; exit 42"]).await;
    pod.create().await.unwrap();
    pod.start_container().await.unwrap();
    assert_eq!(pod.wait().await, 42);
    pod.delete().await.unwrap();
    assert_eq!((pod.stdout(), pod.stderr()), ("out\n".into(), "err\n".into()));
    pod.shutdown().await;
    assert_eq!(pod.topics(), ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    pod.assert_nothing_left();
}

#[tokio::test]
async fn a_process_that_ends_at_once_is_told_to_have_started_first() {
    let pod = Pod::start("quick", &["true"]).await;
    pod.create().await.unwrap();
    pod.start_container().await.unwrap();
    assert_eq!(pod.wait().await, 0);
    pod.delete().await.unwrap();
    pod.shutdown().await;
    assert_eq!(pod.topics()[1..3], ["/tasks/start", "/tasks/exit"]);
}

#[tokio::test]
async fn standard_input_ends_when_containerd_closes_it() {
    let pod = Pod::start("cat", &["cat"]).await;
    pod.create().await.unwrap();
    pod.start_container().await.unwrap();
    pod.write_stdin("one two");
    pod.close_stdin().await;
    assert_eq!(pod.wait().await, 0);
    pod.delete().await.unwrap();
    assert_eq!(pod.stdout(), "one two");
    pod.shutdown().await;
}

#[tokio::test]
async fn a_killed_process_has_128_and_the_signal() {
    let pod = Pod::start("sleep", &["sleep", "1000"]).await;
    pod.create().await.unwrap();
    pod.start_container().await.unwrap();
    pod.kill(9).await.unwrap();
    assert_eq!(pod.wait().await, 137);
    assert_eq!(status(pod.kill(9).await).code, Code::NOT_FOUND);
    pod.delete().await.unwrap();
    pod.shutdown().await;
}

#[tokio::test]
async fn a_running_container_is_not_deleted() {
    let pod = Pod::start("busy", &["sleep", "1000"]).await;
    pod.create().await.unwrap();
    pod.start_container().await.unwrap();
    let refused = status(pod.delete().await);
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (Code::FAILED_PRECONDITION, "cannot delete a process that is running")
    );
    pod.kill(9).await.unwrap();
    pod.wait().await;
    pod.delete().await.unwrap();
    pod.shutdown().await;
}

#[tokio::test]
async fn a_container_is_created_once() {
    let pod = Pod::start("twice", &["true"]).await;
    pod.create().await.unwrap();
    let refused = status(pod.create().await);
    assert_eq!((refused.code, refused.message.as_str()), (Code::ALREADY_EXISTS, "container twice already exists"));
    pod.shutdown_now().await;
}

#[tokio::test]
async fn a_guest_that_panics_at_boot_is_quoted_and_leaves_nothing() {
    let setup = Setup { variables: &[("FAKE_GUEST", "panics")], ..Default::default() };
    let pod = Pod::start_with("panics", &["true"], setup).await;
    let refused = status(pod.create().await);
    assert!(
        refused.message.starts_with("the guest ended before its agent was ready: the guest kernel panicked"),
        "{refused}"
    );
    assert!(refused.message.contains("Kernel panic - not syncing"), "{refused}");
    pod.shutdown().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn an_agent_that_never_answers_meets_the_deadline() {
    let setup = Setup { variables: &[("FAKE_GUEST", "silent")], boot_ms: 300, ..Default::default() };
    let pod = Pod::start_with("silent", &["true"], setup).await;
    let refused = status(pod.create().await);
    assert!(
        refused.message.starts_with("the guest's agent did not answer within 0.3 s; check the initrd"),
        "{refused}"
    );
    pod.shutdown().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn a_boot_under_way_can_be_stopped() {
    let setup = Setup { variables: &[("FAKE_GUEST", "silent")], boot_ms: 60_000, ..Default::default() };
    let pod = Pod::start_with("stopped", &["true"], setup).await;
    let (created, ()) = tokio::join!(pod.create(), async {
        pod.launcher_started().await;
        pod.shutdown_now().await;
    });
    assert_eq!(status(created).message, "the sandbox was stopped while it started");
    pod.assert_nothing_left();
}

#[tokio::test]
async fn a_virtual_machine_that_dies_ends_its_tasks_with_255() {
    let pod = Pod::start("lost", &["sleep", "1000"]).await;
    pod.create().await.unwrap();
    pod.start_container().await.unwrap();
    pod.kill_launcher();
    assert_eq!(pod.wait().await, 255);
    pod.delete().await.unwrap();
    pod.shutdown().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn a_missing_rootfs_is_named_and_the_virtual_machine_ends() {
    let pod = Pod::start("rootless", &["true"]).await;
    let refused = status(pod.create_with_rootfs("/nonexistent/layer").await);
    assert!(
        refused.message.contains("mount the container's root filesystem, bind from /nonexistent/layer"),
        "{refused}"
    );
    pod.shutdown().await;
    pod.assert_nothing_left();
}

#[tokio::test]
async fn what_a_killed_shim_leaves_is_removed_by_delete() {
    let pod = Pod::start("orphan", &["sleep", "1000"]).await;
    pod.create().await.unwrap();
    pod.start_container().await.unwrap();
    pod.kill_shim();
    pod.run_delete(Duration::from_secs(20));
    pod.assert_nothing_left();
}
