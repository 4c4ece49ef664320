//! What containers hear and say.

use caisson_protocol::containerd::api::{CloseIORequest, ResizePtyRequest};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{Guest, config, limit, script};

#[tokio::test]
async fn what_is_typed_arrives_and_its_end_too() {
    let guest = Guest::boot().await;
    let stdin = guest.listener();
    let task = guest.create_with_stdin("web", &config(&["cat"]), stdin.address().to_string()).await.unwrap();
    let mut stdin = stdin.accept().await.unwrap().into_ttrpc();
    task.start().await.unwrap();
    stdin.write_all(b"one\ntwo\n").await.unwrap();
    drop(stdin);
    let outcome = task.end().await;
    assert_eq!((outcome.status, outcome.stdout.as_str()), (0, "one\ntwo\n"));
}

#[tokio::test]
async fn input_ends_behind_its_last_byte_when_the_host_closes_it() {
    let guest = Guest::boot().await;
    let stdin = guest.listener();
    let task = guest.create_with_stdin("web", &config(&["cat"]), stdin.address().to_string()).await.unwrap();
    let mut stdin = stdin.accept().await.unwrap().into_ttrpc();
    task.start().await.unwrap();
    stdin.write_all(b"last words\n").await.unwrap();
    let request = CloseIORequest { id: "web".into(), stdin: true, ..Default::default() };
    guest.tasks.close_io(limit(), &request).await.unwrap();
    drop(stdin);
    assert_eq!(task.end().await.stdout, "last words\n");
}

#[tokio::test]
async fn much_output_arrives_whole() {
    let guest = Guest::boot().await;
    let outcome = guest.run("web", &script("busybox yes 0123456789abcde | busybox head -c 8388608")).await;
    assert_eq!(outcome.stdout.len(), 8 << 20);
    assert!(outcome.stdout.as_bytes().chunks(16).all(|line| line == b"0123456789abcde\n"));
}

#[tokio::test]
async fn standard_output_can_be_opened_by_name() {
    let guest = Guest::boot().await;
    let outcome = guest.run("web", &script("echo named > /dev/stdout; echo wrong > /dev/stderr")).await;
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("named\n", "wrong\n"));
}

#[tokio::test]
async fn a_terminal_has_a_size_and_echoes() {
    let guest = Guest::boot().await;
    let mut config =
        script("stty size; read line; echo \"<$line>\"; stty size; test -t 2 && ls -l /dev/console | cut -c1");
    config["process"]["terminal"] = json!(true);
    config["process"]["consoleSize"] = json!({ "height": 30, "width": 90 });
    let stdin = guest.listener();
    let task = guest.create_with_stdin("web", &config, stdin.address().to_string()).await.unwrap();
    let mut stdin = stdin.accept().await.unwrap().into_ttrpc();
    task.start().await.unwrap();
    guest.until_heard(&task, "30 90\r\n").await;
    let request = ResizePtyRequest { id: "web".into(), width: 100, height: 40, ..Default::default() };
    guest.tasks.resize_pty(limit(), &request).await.unwrap();
    stdin.write_all(b"typed\n").await.unwrap();
    assert_eq!(task.end().await.stdout, "30 90\r\ntyped\r\n<typed>\r\n40 100\r\nc\r\n");
}

#[tokio::test]
async fn a_further_process_has_a_terminal_of_its_own() {
    let guest = Guest::boot().await;
    let task = guest.create("web", &script("sleep 60")).await.unwrap();
    task.start().await.unwrap();
    let mut process = config(&["sh", "-c", "test -t 1 && echo terminal"])["process"].clone();
    process["terminal"] = json!(true);
    let exec = guest.exec("web", "one", &process).await.unwrap();
    exec.start().await.unwrap();
    assert_eq!(exec.end().await.stdout, "terminal\r\n");
}

#[tokio::test]
async fn an_end_is_told_before_the_output_was_read() {
    let guest = Guest::boot().await;
    let stdout = guest.listener();
    let task =
        guest.create_with_stdout("web", &script("echo still there"), stdout.address().to_string()).await.unwrap();
    let mut stdout = stdout.accept().await.unwrap().into_ttrpc();
    task.start().await.unwrap();
    assert_eq!(task.wait().await, 0);
    let mut heard = String::new();
    stdout.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "still there\n");
}
