//! How containers and their processes come and go.

use caisson_protocol::{
    containerd::{
        api::{
            KillRequest, PauseRequest, PidsRequest, ResumeRequest, StateRequest, StatsRequest, Status as TaskStatus,
        },
        cgroups_v2::metrics::Metrics,
    },
    guest::EventsRequest,
    status::{Code, Status},
};
use protobuf::Message;
use serde_json::Value;

use crate::fixture::{Guest, config, limit, script};

fn process(args: &[&str]) -> Value {
    config(args)["process"].clone()
}

fn refusal<T>(answer: Result<T, ttrpc::Error>) -> Status {
    Status::from(answer.err().expect("a refusal"))
}

async fn status(guest: &Guest, id: &str) -> TaskStatus {
    let request = StateRequest { id: id.into(), ..Default::default() };
    guest.tasks.state(limit(), &request).await.unwrap().status.unwrap()
}

#[tokio::test]
async fn a_program_that_is_missing_or_may_not_be_run_ends_as_in_a_shell() {
    let guest = Guest::boot().await;
    let outcome = guest.run("web", &config(&["nosuch"])).await;
    assert_eq!(
        (outcome.status, outcome.stderr.as_str()),
        (127, "exec \"nosuch\": executable file not found in $PATH\n")
    );
    let outcome = guest.run("web", &config(&["/proc/self/status"])).await;
    assert_eq!((outcome.status, outcome.stderr.as_str()), (126, "exec \"/proc/self/status\": permission denied\n"));

    let task = guest.create("web", &script("sleep 60")).await.unwrap();
    task.start().await.unwrap();
    let exec = guest.exec("web", "one", &process(&["/no/such"])).await.unwrap();
    exec.start().await.unwrap();
    let outcome = exec.end().await;
    assert_eq!((outcome.status, outcome.stderr.as_str()), (127, "exec \"/no/such\": no such file or directory\n"));
}

#[tokio::test]
async fn a_created_container_waits_and_a_killed_one_is_told() {
    let guest = Guest::boot().await;
    let mut events = guest.guest.events(caisson_protocol::no_deadline(), &EventsRequest::new()).await.unwrap();
    let task = guest.create("web", &script("trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done")).await.unwrap();
    assert_eq!(status(&guest, "web").await, TaskStatus::CREATED);
    let pid = task.start().await.unwrap();
    assert_eq!(status(&guest, "web").await, TaskStatus::RUNNING);
    assert_eq!(refusal(task.start().await).code, Code::FAILED_PRECONDITION);
    assert_eq!(refusal(task.delete().await).message, "cannot delete a process that is running");
    guest.until_heard(&task, "up\n").await;
    task.kill(15).await.unwrap();
    assert_eq!(task.wait().await, 5);
    assert_eq!(status(&guest, "web").await, TaskStatus::STOPPED);
    let event = events.recv().await.unwrap().unwrap();
    assert_eq!((event.process_exited().pid, event.process_exited().status), (pid, 5));

    let late = refusal(task.kill(9).await);
    assert_eq!((late.code, late.message.as_str()), (Code::NOT_FOUND, "process already finished"));
    task.delete().await.unwrap();
    assert_eq!(refusal(task.kill(9).await).message, "no container web");
}

#[tokio::test]
async fn a_container_that_never_started_can_be_killed_or_deleted() {
    let guest = Guest::boot().await;
    let task = guest.create("web", &script("echo never")).await.unwrap();
    task.kill(9).await.unwrap();
    assert_eq!(task.wait().await, 137);
    assert_eq!(task.delete().await.unwrap().exit_status, 137);
    let task = guest.create("web", &script("echo never")).await.unwrap();
    assert_eq!(task.delete().await.unwrap().exit_status, 137);
}

#[tokio::test]
async fn further_processes_run_beside_the_first() {
    let guest = Guest::boot().await;
    let task = guest.create("web", &script("sleep 60")).await.unwrap();
    let early = refusal(guest.exec("web", "one", &process(&["busybox", "id"])).await.map(drop));
    assert_eq!(early.code, Code::FAILED_PRECONDITION, "{early}");
    let first = task.start().await.unwrap();

    let exec =
        guest.exec("web", "one", &process(&["sh", "-c", "id; grep -c sleep /proc/1/cmdline; exit 9"])).await.unwrap();
    let taken = refusal(guest.exec("web", "one", &process(&["busybox", "id"])).await.map(drop));
    assert_eq!(taken.code, Code::ALREADY_EXISTS);
    exec.start().await.unwrap();
    let outcome = exec.end().await;
    assert_eq!((outcome.status, outcome.stdout.as_str()), (9, "uid=0 gid=0 groups=0,10\n1\n"));

    let exec = guest.exec("web", "two", &process(&["busybox", "sleep", "60"])).await.unwrap();
    let second = exec.start().await.unwrap();
    let request = PidsRequest { id: "web".into(), ..Default::default() };
    let pids = guest.tasks.pids(limit(), &request).await.unwrap().processes;
    let mut pids: Vec<_> = pids.iter().map(|process| process.pid).collect();
    pids.retain(|pid| [first, second].contains(pid));
    assert_eq!(pids, [first, second]);
    assert_eq!(refusal(exec.delete().await).code, Code::FAILED_PRECONDITION);
    exec.kill(9).await.unwrap();
    assert_eq!(exec.end().await.status, 137);

    // All processes at once.
    let exec = guest.exec("web", "three", &process(&["busybox", "sleep", "60"])).await.unwrap();
    exec.start().await.unwrap();
    let request = KillRequest { id: "web".into(), signal: 9, all: true, ..Default::default() };
    guest.tasks.kill(limit(), &request).await.unwrap();
    assert_eq!((exec.wait().await, task.wait().await), (137, 137));
}

#[tokio::test]
async fn a_paused_container_stands_still() {
    let guest = Guest::boot().await;
    let task = guest.create("web", &script("sleep 60")).await.unwrap();
    task.start().await.unwrap();
    guest.tasks.pause(limit(), &PauseRequest { id: "web".into(), ..Default::default() }).await.unwrap();
    assert_eq!(status(&guest, "web").await, TaskStatus::PAUSED);
    guest.tasks.resume(limit(), &ResumeRequest { id: "web".into(), ..Default::default() }).await.unwrap();
    assert_eq!(status(&guest, "web").await, TaskStatus::RUNNING);

    let request = StatsRequest { id: "web".into(), ..Default::default() };
    let stats = guest.tasks.stats(limit(), &request).await.unwrap().stats.unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let stats = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert!(stats.memory.usage > 0 && stats.cpu.usage_usec > 0, "{stats}");
    assert_eq!(stats.pids.limit, 100);
}

#[tokio::test]
async fn two_containers_are_made_at_once_and_do_not_see_each_other() {
    let guest = Guest::boot().await;
    // The shell, ls and wc.
    let (one, two) = (script("ls -d /proc/[0-9]* | wc -l; echo one"), script("echo two"));
    let (first, second) = tokio::join!(guest.run("one", &one), guest.run("two", &two));
    assert_eq!((first.stdout.as_str(), second.stdout.as_str()), ("3\none\n", "two\n"));
}

#[tokio::test]
async fn a_container_that_cannot_be_made_leaves_nothing_and_says_why() {
    let guest = Guest::boot().await;
    let mut broken = script("true");
    broken["mounts"].as_array_mut().unwrap().push(serde_json::json!(
        { "destination": "/data", "type": "bind", "source": "/no/such/folder", "options": ["rbind"] }
    ));
    let reason = refusal(guest.create("web", &broken).await.map(drop));
    assert!(reason.message.contains("/no/such/folder"), "{reason}");
    assert_eq!(guest.run("web", &script("echo again")).await.stdout, "again\n");

    let task = guest.create("web", &script("true")).await.unwrap();
    assert_eq!(refusal(guest.create("web", &script("true")).await.map(drop)).code, Code::ALREADY_EXISTS);
    task.delete().await.unwrap();
    let reason = refusal(guest.tasks.state(limit(), &StateRequest { id: "web".into(), ..Default::default() }).await);
    assert_eq!((reason.code, reason.message.as_str()), (Code::NOT_FOUND, "no container web"));
}
