//! `run` and the other subcommands for people.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
};

use crate::fixture::{Backend, Images, for_backend, for_each_backend, text};

for_each_backend!(
    a_guest_in_a_pipe_hears_its_input_and_ends_well,
    a_guest_that_panics_ends_badly_with_one_sentence,
    a_missing_kernel_is_told_with_its_path,
    serve_without_a_socket_says_what_is_missing
);
for_backend!(qemu_only, Qemu, the_options_are_told_as_json);

fn start(backend: Backend, images: &Images, what: &str) -> Child {
    let options = backend.options().replace(" = ", "=");
    let options = options.lines().flat_map(|option| ["--set", option]);
    Command::new(backend.launcher())
        .args(["run", "--memory", "192", "--kernel", &text(&backend.kernel(images))])
        .args(["--initrd", &text(&images.initrd), "--append", &format!("rdinit=/test-init do={what}")])
        .args(options)
        .args(hypervisor(backend))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Where the one under test is, if that is not the launcher's default.
fn hypervisor(backend: Backend) -> Vec<String> {
    let path = backend.hypervisor().unwrap_or_default();
    if path.is_empty() { Vec::new() } else { vec!["--hypervisor".to_owned(), path] }
}

async fn a_guest_in_a_pipe_hears_its_input_and_ends_well(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let mut child = start(backend, &images, "echo");
    let mut console = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(console.any(|line| line.contains("guest: up")));
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"good morning\n").unwrap();
    assert!(console.any(|line| line.contains("guest: heard good morning")));
    stdin.write_all(b"good night\n").unwrap();
    assert!(console.any(|line| line.contains("guest: heard good night")));
    assert!(child.wait().unwrap().success());
}

async fn a_guest_that_panics_ends_badly_with_one_sentence(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let output = start(backend, &images, "panic").wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        format!("caisson-vmm-{}: the guest kernel panicked: sysrq triggered crash\n", backend.name())
    );
    assert_eq!(output.status.code(), Some(1));
}

async fn a_missing_kernel_is_told_with_its_path(backend: Backend) {
    let mut command = Command::new(backend.launcher());
    let output = command.args(["run", "--kernel", "/nonexistent/k"]).args(hypervisor(backend)).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        format!(
            "caisson-vmm-{}: open the guest kernel /nonexistent/k: No such file or directory (os error 2)\n",
            backend.name()
        )
    );
    assert_eq!(output.status.code(), Some(1));
}

async fn the_options_are_told_as_json(backend: Backend) {
    let output = Command::new(backend.launcher()).arg("options").output().unwrap();
    let options: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let machine_type = options.as_array().unwrap().iter().find(|option| option["key"] == "machine_type").unwrap();
    assert_eq!(machine_type["default"], "microvm");
    assert_eq!(machine_type["accepted"], serde_json::json!(["microvm", "q35"]));
}

async fn serve_without_a_socket_says_what_is_missing(backend: Backend) {
    let output = Command::new(backend.launcher()).arg("serve").stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.ends_with("use standard input as the socket to serve on: standard input is not a listening socket\n"),
        "{stderr}"
    );
}
