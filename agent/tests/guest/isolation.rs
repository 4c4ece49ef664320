//! What a container may see and do.

use caisson_protocol::{containerd::api::UpdateTaskRequest, guest::EventsRequest};
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::{Value, json};

use crate::fixture::{Guest, config, limit, script};

fn process(args: &[&str]) -> Value {
    config(args)["process"].clone()
}

#[tokio::test]
async fn a_container_has_its_own_names_limits_and_identity() {
    let guest = Guest::boot().await;
    let mut config = script(
        "hostname; echo $GREETING $HOME; id; ulimit -n; pwd; umask; cat /proc/self/oom_score_adj /proc/sys/kernel/msgmax; \
         grep -E '^(CapEff|NoNewPrivs)' /proc/self/status",
    );
    config["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [10, 20], "umask": 0o027 });
    config["process"]["cwd"] = json!("/run");
    config["process"]["oomScoreAdj"] = json!(500);
    config["process"]["capabilities"] = json!({ "bounding": ["CAP_KILL"] });
    config["linux"]["sysctl"] = json!({ "kernel.msgmax": "4096" });
    let outcome = guest.run("web", &config).await;
    assert_eq!(outcome.stderr, "");
    let expected = "box\nhello /\nuid=1000 gid=1001 groups=10,20\n1024\n/run\n0027\n500\n4096\n\
        CapEff:\t0000000000000000\nNoNewPrivs:\t1\n";
    assert_eq!(outcome.stdout, expected);
}

#[tokio::test]
async fn root_keeps_the_capabilities_of_its_configuration_and_no_more() {
    let guest = Guest::boot().await;
    let outcome = guest.run("web", &script("grep -E '^Cap(Eff|Bnd)' /proc/self/status")).await;
    assert_eq!(outcome.stdout, "CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n");
}

#[tokio::test]
async fn masked_and_read_only_paths_hold() {
    let guest = Guest::boot().await;
    let mut config = script(
        "cat /proc/kcore | wc -c; ls /sys/firmware | wc -l; echo x > /proc/sys/kernel/hostname; \
         touch /file; ls -ld /dev/fuse /dev/null | cut -c1; mount -t tmpfs x /run || echo refused",
    );
    config["root"]["readonly"] = json!(true);
    config["linux"]["devices"] =
        json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666 }]);
    let outcome = guest.run("web", &config).await;
    assert_eq!(outcome.stdout, "0\n0\nc\nc\nrefused\n", "{}", outcome.stderr);
    assert_eq!(outcome.stderr.matches("Read-only file system").count(), 2, "{}", outcome.stderr);
}

#[tokio::test]
async fn seccomp_holds_for_the_container_and_for_further_processes() {
    let guest = Guest::boot().await;
    let mut config = script("mkdir /x; grep Seccomp: /proc/self/status; sleep 60");
    config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }]
    });
    // Without it, the filter needs a privilege that is dropped soon after.
    config["process"]["noNewPrivileges"] = json!(false);
    let task = guest.create("web", &config).await.unwrap();
    task.start().await.unwrap();
    let exec = guest.exec("web", "one", &process(&["sh", "-c", "mkdir /y; grep Seccomp: /proc/self/status"])).await;
    let exec = exec.unwrap();
    exec.start().await.unwrap();
    let exec = exec.end().await;
    assert_eq!(exec.stdout, "Seccomp:\t2\n");
    assert!(exec.stderr.contains("Operation not permitted"), "{}", exec.stderr);
    task.kill(9).await.unwrap();
    let outcome = task.end().await;
    assert_eq!(outcome.stdout, "Seccomp:\t2\n");
    assert!(outcome.stderr.contains("Operation not permitted"), "{}", outcome.stderr);
}

#[tokio::test]
async fn the_cgroup_is_the_containers_own_and_its_limits_hold() {
    let guest = Guest::boot().await;
    let outcome =
        guest.run("web", &script("cat /proc/self/cgroup /sys/fs/cgroup/pids.max; ls /sys/fs/cgroup/web")).await;
    assert_eq!(outcome.stdout, "0::/\n100\n", "{}", outcome.stderr);

    let mut config = script("cat /sys/fs/cgroup/pids.max; read x; cat /sys/fs/cgroup/pids.max");
    config["linux"]["resources"]["cpu"] = json!({ "shares": 512, "cpus": "0-63", "mems": "0-3" });
    let stdin = guest.listener();
    let task = guest.create_with_stdin("web", &config, stdin.address().to_string()).await.unwrap();
    let mut stdin = stdin.accept().await.unwrap().into_ttrpc();
    task.start().await.unwrap();
    guest.until_heard(&task, "100\n").await;
    let resources = json!({ "pids": { "limit": 55 } }).to_string().into_bytes();
    let resources = MessageField::some(Any { value: resources, ..Default::default() });
    let request = UpdateTaskRequest { id: "web".into(), resources, ..Default::default() };
    guest.tasks.update(limit(), &request).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"go\n").await.unwrap();
    assert_eq!(task.end().await.stdout, "100\n55\n");
}

#[tokio::test]
async fn a_container_without_memory_left_is_told() {
    let guest = Guest::boot().await;
    let mut events = guest.guest.events(caisson_protocol::no_deadline(), &EventsRequest::new()).await.unwrap();
    let mut config = config(&["busybox", "tail", "/dev/zero"]);
    config["linux"]["resources"]["memory"] = json!({ "limit": 16 << 20 });
    let task = guest.create("web", &config).await.unwrap();
    task.start().await.unwrap();
    assert_eq!(task.wait().await, 137);
    let (mut out_of_memory, mut exited) = (false, false);
    while !(out_of_memory && exited) {
        let event = events.recv().await.unwrap().unwrap();
        out_of_memory |= event.has_out_of_memory() && event.out_of_memory().container_id == "web";
        exited |= event.has_process_exited() && event.process_exited().status == 137;
    }
}

#[tokio::test]
async fn hooks_of_the_guest_run_in_the_container() {
    let guest = Guest::boot().await;
    let mut config = script("cat /run/hook");
    let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo hooked > /run/hook"] }]);
    config["hooks"] = json!({ "startContainer": hook });
    assert_eq!(guest.run("web", &config).await.stdout, "hooked\n");
}

#[tokio::test]
async fn a_node_of_the_guests_disk_can_be_made_but_not_opened() {
    let guest = Guest::boot().await;
    let read = "mknod /dev/disk b $(cut -d: -f1 /sys/block/vda/dev) 0; busybox head -c 4 /dev/disk | wc -c";
    let outcome = guest.run("web", &script(read)).await;
    assert_eq!(outcome.stdout, "0\n", "{}", outcome.stderr);
    assert!(outcome.stderr.contains("Operation not permitted"), "{}", outcome.stderr);
    let mut privileged = script(read);
    privileged["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    assert_eq!(guest.run("web", &privileged).await.stdout, "4\n");
}
