//! The `caisson` command on sandboxes that run.

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use anyhow::{Context, Result};
use caisson_testbed::{Configuration, Containerd, Installation, Outcome, Session};

use crate::LIMIT;

#[test]
fn a_sandbox_is_listed_inspected_and_measured() -> Result<()> {
    let installation = Installation::find()?;
    let configuration = Configuration::of_this_run(&installation).with_option("kernel_params", "loglevel=7");
    let containerd = Containerd::start_with(&installation, &configuration)?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let listed = ask(&containerd, &["sandbox", "list", "--json"])?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    assert_eq!(listed[0]["id"], id.as_str(), "{listed}");

    let inspected = ask(&containerd, &["sandbox", "inspect", &id, "--json"])?;
    let inspected: serde_json::Value = serde_json::from_str(&inspected)?;
    assert_eq!(inspected["containers"][0]["status"], "running", "{inspected}");
    assert_eq!(inspected["guest"]["vcpus"], 1, "{inspected}");
    let configuration = containerd.scope().dir().join("configuration.toml");
    assert_eq!(inspected["configuration"].as_str(), configuration.to_str(), "{inspected}");

    let metrics = ask(&containerd, &["sandbox", "metrics", &id])?;
    for name in ["caisson_vm_console_bytes_total", "caisson_agent_resident_bytes"] {
        assert!(metrics.contains(&format!("# TYPE {name} ")), "no {name} in:\n{metrics}");
    }
    let log = ask(&containerd, &["sandbox", "logs", &id])?;
    assert!(log.contains("Linux version"), "{log}");
    containerd.remove(&id)?;
    assert_eq!(ask(&containerd, &["sandbox", "list", "--json"])?, "[]\n");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_program_in_a_container_has_its_streams_and_its_exit_code() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&["--env", "GREETING=hello"], &["sleep", "600"])?;
    let script = "read line; echo $GREETING $line $MORE; pwd; echo oops >&2; exit 7";
    let exec = ["sandbox", "exec", "-w", "/tmp", "-e", "MORE=again", &id, "--", "sh", "-c", script];
    let mut session = Session::start(caisson(&containerd, &exec)?)?;
    session.feed(b"world\n".to_vec());
    let outcome = session.wait(LIMIT)?;
    let said = (outcome.code, outcome.stdout_text(), outcome.stderr.clone());
    assert_eq!(said, (7, "hello world again\n/tmp\n".to_owned(), "oops\n".to_owned()));

    let mut count = Session::start(caisson(&containerd, &["sandbox", "exec", &id, "--", "wc", "-c"])?)?;
    count.feed(vec![b'x'; 3 << 20]);
    assert_eq!(count.wait(LIMIT)?.stdout_text(), format!("{}\n", 3 << 20));
    let told = run(&containerd, &["sandbox", "exec", &id, "--json", "--", "sh", "-c", "cat; echo oops >&2; exit 7"])?;
    let lines: Vec<_> = told.stdout_text().lines().map(str::to_owned).collect();
    assert_eq!((told.code, told.stderr.as_str()), (7, ""));
    assert_eq!(lines, [r#"{"stream":"stderr","line":"oops"}"#, r#"{"exit_code":7}"#]);
    let missing = run(&containerd, &["sandbox", "exec", &id, "--", "nosuch"])?;
    assert_eq!(missing.code, 127, "{}", missing.stderr);
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn on_a_terminal_a_program_has_one_too() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let command = caisson(&containerd, &["sandbox", "exec", &id])?;
    let mut session = Session::start_on_terminal(command, 33, 77)?;
    session.write(b"stty size; tty\n")?;
    session.wait_for("33 77", LIMIT)?;
    session.write(b"exit 5\n")?;
    session.wait_for("exit 5", LIMIT)?;
    assert_eq!(session.wait(LIMIT)?.code, 5);
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_shell_in_the_guest_is_refused_unless_the_configuration_allows_it() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let refused = run(&containerd, &["sandbox", "console", &id])?;
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("the configuration has no debug console"), "{}", refused.stderr);
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_shell_in_the_guest_reads_what_is_typed_and_ends() -> Result<()> {
    let installation = Installation::find()?;
    let dir = tempfile::tempdir()?;
    let initrd = with_busybox(&installation.guest.initrd, dir.path())?;
    let configuration = Configuration::of_this_run(&installation)
        .with_option("initrd", initrd)
        .with("agent.debug_console_enabled", true);
    let containerd = Containerd::start_with(&installation, &configuration)?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let command = caisson(&containerd, &["sandbox", "console", &id])?;
    let mut session = Session::start_on_terminal(command, 40, 100)?;
    session.write(b"echo pid $((40 + 2)); busybox stty size\n")?;
    session.wait_for("pid 42", LIMIT)?;
    session.wait_for("40 100", LIMIT)?;
    session.write(b"exit\n")?;
    assert_eq!(session.wait(LIMIT)?.code, 0);

    let mut script = Session::start(caisson(&containerd, &["sandbox", "console", &id])?)?;
    script.feed(b"echo from a $((1 + 1))-line script\n".to_vec());
    let outcome = script.wait(LIMIT)?;
    assert!(outcome.stdout_text().contains("from a 2-line script"), "{outcome:?}");

    let mut script = Session::start(caisson(&containerd, &["sandbox", "console", &id, "--json"])?)?;
    script.feed(b"echo from a $((1 + 1))-line script\n".to_vec());
    let outcome = script.wait(LIMIT)?;
    assert!(outcome.stdout_text().lines().any(|line| line == r#"{"line":"from a 2-line script"}"#), "{outcome:?}");
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_name_that_no_sandbox_has_is_answered_with_those_that_run() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let id = containerd.run_detached(&[], &["sleep", "600"])?;
    let told = run(&containerd, &["sandbox", "inspect", "nosuch"])?.stderr;
    assert_eq!(told, format!("caisson: no sandbox nosuch; running: {id} ({})\n", containerd.namespace()));
    containerd.remove(&id)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn the_next_sandbox_is_made_by_what_hypervisor_use_says() -> Result<()> {
    let installation = Installation::find()?;
    let (one, two) = configurations(&installation);
    let containerd = Containerd::start_with(&installation, &one)?;
    let dir = containerd.scope().dir();
    let link = dir.join("configuration.toml");
    fs::rename(&link, dir.join("configuration-one.toml"))?;
    symlink("configuration-one.toml", &link)?;
    let two = containerd.write_configuration("configuration-two.toml", &two)?;
    assert_eq!(containerd.run(&[], &["nproc"])?.stdout_text(), "1\n");

    let used = ask(&containerd, &["hypervisor", "use", "--config", two.to_str().context("path")?])?;
    assert!(used.starts_with(&format!("new sandboxes use {}\n", two.display())), "{used}");
    assert_eq!(containerd.run(&[], &["nproc"])?.stdout_text(), "2\n");

    fs::write(dir.join("configuration-broken.toml"), "[hypervisor.qemu]\nkernle = 1\n")?;
    let broken = dir.join("configuration-broken.toml");
    let refused = run(&containerd, &["hypervisor", "use", "--config", broken.to_str().context("path")?])?;
    assert!(refused.code == 1 && refused.stderr.contains("kernle"), "{}", refused.stderr);
    assert_eq!(containerd.run(&[], &["nproc"])?.stdout_text(), "2\n");

    ask(&containerd, &["hypervisor", "use", "--previous"])?;
    assert_eq!(containerd.run(&[], &["nproc"])?.stdout_text(), "1\n");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn two_pods_have_two_configurations_at_once() -> Result<()> {
    let installation = Installation::find()?;
    let (one, two) = configurations(&installation);
    let containerd = Containerd::start_with(&installation, &one)?;
    let two = containerd.write_configuration("two.toml", &two)?;
    let small = containerd.run_detached(&[], &["sleep", "600"])?;
    let option = ["--runtime-config-path", two.to_str().context("path")?];
    let large = containerd.run_detached(&option, &["sleep", "600"])?;
    assert_eq!(containerd.exec(&small, &["nproc"]).run()?.stdout_text(), "1\n");
    assert_eq!(containerd.exec(&large, &["nproc"]).run()?.stdout_text(), "2\n");
    containerd.remove(&small)?;
    containerd.remove(&large)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn an_annotation_counts_when_it_is_allowed_and_is_told_when_not() -> Result<()> {
    let installation = Installation::find()?;
    let allowed = toml::Value::from(vec!["default_vcpus"]);
    let configuration = Configuration::of_this_run(&installation).with_option("enable_annotations", allowed);
    let containerd = Containerd::start_with(&installation, &configuration)?;
    for prefix in ["io.caisson.config.hypervisor", "io.katacontainers.config.hypervisor"] {
        let annotation = format!("{prefix}.default_vcpus=2");
        let outcome = containerd.run(&["--annotation", &annotation], &["nproc"])?;
        assert_eq!(outcome.stdout_text(), "2\n", "{}", outcome.stderr);
    }
    let annotation = "io.caisson.config.hypervisor.kernel_params=quiet";
    let refused = containerd.run(&["--annotation", annotation], &["true"])?;
    assert_eq!(refused.code, 1);
    let file = containerd.scope().dir().join("configuration.toml").display().to_string();
    for part in ["io.caisson.config.hypervisor.kernel_params", "enable_annotations", &file] {
        assert!(refused.stderr.contains(part), "no \"{part}\" in: {}", refused.stderr);
    }
    containerd.assert_nothing_left();
    Ok(())
}

/// With one vCPU, and with two.
fn configurations(installation: &Installation) -> (Configuration, Configuration) {
    let one = Configuration::of_this_run(installation);
    (one.clone().with_option("default_vcpus", 1), one.with_option("default_vcpus", 2))
}

/// `caisson <arguments>`, of this build, for the sandboxes of `containerd`.
fn caisson(containerd: &Containerd, arguments: &[&str]) -> Result<Command> {
    let dir = containerd.scope().dir();
    let mut command = Command::new(Installation::find()?.programs.join("caisson"));
    command.env("CAISSON_RUN_DIR", containerd.scope().run_dir());
    command.env("CAISSON_CONF_FILE", dir.join("configuration.toml")).args(arguments);
    Ok(command)
}

fn run(containerd: &Containerd, arguments: &[&str]) -> Result<Outcome> {
    let mut session = Session::start(caisson(containerd, arguments)?)?;
    session.close_input();
    session.wait(LIMIT)
}

fn ask(containerd: &Containerd, arguments: &[&str]) -> Result<String> {
    Ok(run(containerd, arguments)?.success()?.stdout_text())
}

/// `initrd` with the machine's busybox in it as the shell. The kernel unpacks archives one after another.
fn with_busybox(initrd: &Path, dir: &Path) -> Result<String> {
    let root = dir.join("root");
    fs::create_dir_all(root.join("bin"))?;
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    symlink("busybox", root.join("bin/sh"))?;
    let joined = dir.join("initrd");
    let script = format!(
        "cp {} {joined} && cd {} && find . | busybox cpio -o -H newc >> {joined}",
        initrd.display(),
        root.display(),
        joined = joined.display()
    );
    let output = Command::new("sh").args(["-c", &script]).output()?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    joined.into_os_string().into_string().ok().context("the path is text")
}
