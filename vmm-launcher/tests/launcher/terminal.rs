//! `run` and the other subcommands for people.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
};

use crate::fixture::{Images, LAUNCHER, text};

fn start(images: &Images, what: &str) -> Child {
    Command::new(LAUNCHER)
        .args(["run", "--accel", "tcg", "--memory", "192", "--kernel", &text(&images.kernel)])
        .args(["--initrd", &text(&images.initrd), "--append", &format!("rdinit=/test-init do={what}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_guest_in_a_pipe_hears_its_input_and_ends_well() {
    let Some(images) = Images::find() else { return };
    let mut child = start(&images, "echo");
    let mut console = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(console.any(|line| line.contains("guest: up")));
    child.stdin.take().unwrap().write_all(b"good morning\n").unwrap();
    assert!(console.any(|line| line.contains("guest: heard good morning")));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_guest_that_panics_ends_badly_with_one_sentence() {
    let Some(images) = Images::find() else { return };
    let output = start(&images, "panic").wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "caisson-vmm-qemu: the guest kernel panicked: sysrq triggered crash\n"
    );
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_missing_kernel_is_told_with_its_path() {
    let output = Command::new(LAUNCHER).args(["run", "--kernel", "/nonexistent/k"]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "caisson-vmm-qemu: open the guest kernel /nonexistent/k: No such file or directory (os error 2)\n"
    );
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn the_options_are_told_as_json() {
    let output = Command::new(LAUNCHER).arg("options").output().unwrap();
    let options: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let machine_type = options.as_array().unwrap().iter().find(|option| option["key"] == "machine_type").unwrap();
    assert_eq!(machine_type["default"], "microvm");
    assert_eq!(machine_type["accepted"], serde_json::json!(["microvm", "q35"]));
}

#[test]
fn serve_without_a_socket_says_what_is_missing() {
    let output = Command::new(LAUNCHER).arg("serve").stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.ends_with("use standard input as the socket to serve on: standard input is not a listening socket\n"),
        "{stderr}"
    );
}
