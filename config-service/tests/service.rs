//! The service as shims meet it: started on demand, shared, surviving its own death.

mod host;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use caisson_config_service::{client::ConfigService, installation::FILE_VARIABLE};
use caisson_protocol::{
    config::{CheckRequest, ResolveRequest, ShowRequest, UseRequest, WatchEvent, WatchRequest},
    config_ttrpc::ConfigClient,
    deadline, listen,
    paths::RUN_DIR_VARIABLE,
};
use host::{Host, LIMIT, ask};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ttrpc::asynchronous::{Client, ClientStreamReceiver};

/// Ends the service that a test's calls started.
struct Started<'a>(&'a Host);

impl Drop for Started<'_> {
    fn drop(&mut self) {
        for service in services(self.0) {
            let _ = kill(service, Signal::SIGKILL);
        }
    }
}

/// A service on a socket of its own, as the test's child.
fn start(host: &Host, arguments: &[&str]) -> Child {
    host.service();
    let listener = listen::bind(&host.path("run/config.sock")).unwrap();
    Command::new(host.path("bin/caisson-config-service"))
        .arg("serve")
        .args(arguments)
        .env(FILE_VARIABLE, host.path("etc/configuration.toml"))
        .stdin(listen::as_stdin(listener))
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The processes that run this host's service.
fn services(host: &Host) -> Vec<Pid> {
    let program = host.path("bin/caisson-config-service");
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|process| fs::read_link(process.path().join("exe")).is_ok_and(|exe| exe == program))
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .collect()
}

async fn client(host: &Host) -> ConfigClient {
    let stream = tokio::net::UnixStream::connect(host.path("run/config.sock")).await.unwrap();
    ConfigClient::new(Client::new(stream.into()))
}

async fn check(host: &Host, file: &Path) -> Vec<String> {
    let request = CheckRequest { config_path: file.display().to_string(), ..Default::default() };
    client(host).await.check(deadline(LIMIT), &request).await.unwrap().problems
}

#[tokio::test]
async fn the_first_call_starts_the_service_and_the_second_finds_it() {
    let host = Host::new();
    let file = host.configure("default_vcpus = 2");
    let (service, _started) = (host.service(), Started(&host));
    assert_eq!(ask(&service, &file).await.unwrap().vm.vcpus, 2);
    let first = services(&host);
    ask(&service, &file).await.unwrap();
    assert_eq!((first.len(), services(&host)), (1, first));
}

/// With systemd's own program for trying units, where there is one.
#[tokio::test]
async fn the_socket_that_systemd_made_starts_the_service_with_the_first_call() {
    let host = Host::new();
    let file = host.configure("default_vcpus = 2");
    let (_, _started) = (host.service(), Started(&host));
    let socket = host.path("run/config.sock");
    let mut systemd = Command::new("systemd-socket-activate");
    systemd.arg("--inetd").arg("--listen").arg(&socket).arg(host.path("bin/caisson-config-service")).arg("serve");
    let mut activator = match systemd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn() {
        Ok(activator) => activator,
        Err(error) => return eprintln!("skipped: execute systemd-socket-activate: {error}"),
    };
    let mut said = BufReader::new(activator.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.starts_with("Listening on "), "{line}");
    assert_eq!(services(&host), []);

    // Without a program of its own to start.
    let service = ConfigService::new(&socket, Vec::new());
    assert_eq!(ask(&service, &file).await.unwrap().vm.vcpus, 2);
    assert_eq!(services(&host), [Pid::from_raw(activator.id().cast_signed())]);
    activator.kill().unwrap();
    activator.wait().unwrap();
}

#[tokio::test]
async fn racing_first_calls_start_one_service() {
    let host = Host::new();
    let file = host.configure("");
    let (service, _started) = (host.service(), Started(&host));
    let (one, other) = tokio::join!(ask(&service, &file), ask(&service, &file));
    assert_eq!(one.unwrap(), other.unwrap());
    assert_eq!(services(&host).len(), 1);
}

#[tokio::test]
async fn a_killed_service_is_started_again() {
    let host = Host::new();
    let file = host.configure("");
    let (service, _started) = (host.service(), Started(&host));
    ask(&service, &file).await.unwrap();
    let first = services(&host)[0];
    kill(first, Signal::SIGKILL).unwrap();
    ask(&service, &file).await.unwrap();
    assert!(services(&host).iter().any(|service| *service != first));
}

#[tokio::test]
async fn two_hundred_calls_at_once_are_answered() {
    let host = Host::new();
    let file = host.configure("");
    let (service, _started) = (host.service(), Started(&host));
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let (service, file) = (service.clone(), file.clone());
            tokio::spawn(async move { ask(&service, &file).await })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().hypervisor, "qemu");
    }
    assert_eq!(services(&host).len(), 1);
}

#[tokio::test]
async fn a_broken_configuration_is_refused_with_its_problems() {
    let host = Host::new();
    let file = host.configure("bogus = 1");
    let (service, _started) = (host.service(), Started(&host));
    let told = ask(&service, &file).await.unwrap_err();
    assert!(told.starts_with(&format!("the configuration {} has a problem: ", file.display())), "{told}");
    assert!(told.contains("hypervisor.qemu.bogus: unknown key"), "{told}");
}

#[tokio::test]
async fn a_host_without_the_program_says_where_it_looked() {
    let host = Host::new();
    let service = ConfigService::new(&host.path("run/config.sock"), vec![host.path("bin")]);
    let told = ask(&service, Path::new("")).await.unwrap_err();
    assert!(told.starts_with("start caisson-config-service: look for it in ") && told.contains("/bin: "), "{told}");
}

#[tokio::test]
async fn a_service_that_ends_at_once_is_reported_with_its_log() {
    let host = Host::new();
    host.program("bin/caisson-config-service", "exit 1");
    let service = ConfigService::new(&host.path("run/config.sock"), vec![host.path("bin")]);
    let told = ask(&service, Path::new("")).await.unwrap_err();
    assert!(told.starts_with("caisson-config-service did not answer; its log is "), "{told}");
}

#[tokio::test]
async fn a_changed_file_holds_for_the_next_call() {
    let host = Host::new();
    let file = host.configure("default_vcpus = 1");
    let (service, _started) = (host.service(), Started(&host));
    assert_eq!(ask(&service, &file).await.unwrap().vm.vcpus, 1);
    host.configure("default_vcpus = 2");
    assert_eq!(ask(&service, &file).await.unwrap().vm.vcpus, 2);
    host.write("etc/config.d/a.toml", "[hypervisor.qemu]\ndefault_vcpus = 3");
    assert_eq!(ask(&service, &file).await.unwrap().vm.vcpus, 3);
    fs::remove_file(host.path("etc/config.d/a.toml")).unwrap();
    assert_eq!(ask(&service, &file).await.unwrap().vm.vcpus, 2);
}

#[tokio::test]
async fn what_became_broken_stays_in_force_as_it_was_and_check_says_so() {
    let host = Host::new();
    let file = host.configure("default_vcpus = 3");
    let (service, _started) = (host.service(), Started(&host));
    ask(&service, &file).await.unwrap();
    host.configure("default_vcpus = nonsense");
    assert_eq!(ask(&service, &file).await.unwrap().vm.vcpus, 3);
    let told = check(&host, &file).await;
    assert_eq!(told.len(), 2, "{told:?}");
    assert_eq!(told[1], "the last good configuration stays in force");
    let log = fs::read_to_string(host.path("run/config.log")).unwrap();
    assert!(log.contains("last_good_in_force=true"), "{log}");
}

#[tokio::test]
async fn a_last_good_configuration_without_its_files_is_not_used() {
    let host = Host::new();
    let file = host.configure("initrd = \"DIR/initrd\"");
    let (service, _started) = (host.service(), Started(&host));
    ask(&service, &file).await.unwrap();
    fs::remove_file(host.path("initrd")).unwrap();
    let told = ask(&service, &file).await.unwrap_err();
    assert!(told.ends_with("initrd does not exist"), "{told}");
}

#[tokio::test]
async fn a_launcher_installed_later_is_found() {
    let host = Host::new();
    let file = host.configure("");
    fs::rename(host.path("bin/caisson-vmm-qemu"), host.path("later")).unwrap();
    let (service, _started) = (host.service(), Started(&host));
    assert!(ask(&service, &file).await.unwrap_err().contains("caisson-vmm-qemu is not installed"));
    fs::rename(host.path("later"), host.path("bin/caisson-vmm-qemu")).unwrap();
    ask(&service, &file).await.unwrap();
}

#[tokio::test]
async fn show_tells_every_value_and_its_origin() {
    let host = Host::new();
    let file = host.configure("default_vcpus = 2");
    let mut service = start(&host, &[]);
    let request = ShowRequest { config_path: file.display().to_string(), ..Default::default() };
    let settings = client(&host).await.show(deadline(LIMIT), &request).await.unwrap().settings;
    let vcpus = settings.iter().find(|setting| setting.key == "hypervisor.qemu.default_vcpus").unwrap();
    assert_eq!((vcpus.value.as_str(), vcpus.origin.as_str()), ("2", format!("{}:4", file.display()).as_str()));
    assert!(settings.iter().any(|setting| setting.key == "runtime.log_level" && setting.origin == "default"));
    service.kill().unwrap();
    service.wait().unwrap();
}

#[tokio::test]
async fn without_connections_the_service_ends_itself() {
    let host = Host::new();
    let mut service = start(&host, &["--idle-timeout", "1"]);
    assert!(service.wait().unwrap().success());
}

#[tokio::test]
async fn a_call_after_the_idle_end_starts_it_again() {
    let host = Host::new();
    let file = host.configure("");
    let mut idle = start(&host, &["--idle-timeout", "1"]);
    idle.wait().unwrap();
    let (service, _started) = (host.service(), Started(&host));
    assert_eq!(ask(&service, &file).await.unwrap().hypervisor, "qemu");
}

#[tokio::test]
async fn what_was_good_outlives_the_service() {
    let host = Host::new();
    let file = host.configure("default_vcpus = 3");
    let (service, _started) = (host.service(), Started(&host));
    ask(&service, &file).await.unwrap();
    kill(services(&host)[0], Signal::SIGKILL).unwrap();
    host.configure("default_vcpus = nonsense");
    let config = ask(&service, &file).await.unwrap();
    assert_eq!(config.vm.vcpus, 3);
    assert_eq!(config.warnings[1], "the last good configuration stays in force");
}

#[tokio::test]
async fn a_state_that_a_killed_service_did_not_finish_is_not_read() {
    let host = Host::new();
    let file = host.configure("default_vcpus = 3");
    let (service, _started) = (host.service(), Started(&host));
    ask(&service, &file).await.unwrap();
    kill(services(&host)[0], Signal::SIGKILL).unwrap();
    let kept = fs::read_dir(host.path("run/config.kept")).unwrap().next().unwrap().unwrap().path();
    fs::rename(&kept, kept.with_added_extension("new")).unwrap();
    host.configure("default_vcpus = nonsense");
    let told = ask(&service, &file).await.unwrap_err();
    assert!(told.contains("toml:4:17: "), "{told}");
}

#[tokio::test]
async fn an_annotation_that_is_refused_reaches_the_shim_as_a_sentence() {
    let host = Host::new();
    host.configure("");
    let (service, _started) = (host.service(), Started(&host));
    let annotations = [("io.caisson.config.hypervisor.default_memory".to_owned(), "1024".to_owned())].into();
    let config_path = host.path("etc/configuration.toml").display().to_string();
    let request = ResolveRequest { config_path, annotations, ..Default::default() };
    let error = service.resolve(&request, LIMIT).await.unwrap_err();
    assert_eq!(
        host.shortened(&caisson_protocol::status::sentence(&error)),
        "annotation io.caisson.config.hypervisor.default_memory: not allowed; add enable_annotations with \
         \"default_memory\" to [hypervisor.qemu] at DIR/etc/configuration.toml:1"
    );
}

#[tokio::test]
async fn use_switches_what_the_next_sandbox_gets() {
    let host = Host::new();
    for hypervisor in ["builtin", "qemu"] {
        let shipped = host.installed(hypervisor, "");
        fs::rename(&shipped, host.path("etc").join(shipped.file_name().unwrap())).unwrap();
    }
    let mut running = start(&host, &[]);
    let service = host.service();
    let request = |name: &str| UseRequest { configuration: name.into(), ..Default::default() };
    service.use_configuration(&request("qemu"), LIMIT).await.unwrap();
    assert_eq!(ask(&service, Path::new("")).await.unwrap().hypervisor, "qemu");
    let switched = service.use_configuration(&request("dragonball"), LIMIT).await.unwrap();
    assert!(switched.path.ends_with("configuration-builtin.toml"), "{switched}");
    assert_eq!(ask(&service, Path::new("")).await.unwrap().hypervisor, "builtin");
    service.use_configuration(&request(""), LIMIT).await.unwrap();
    assert_eq!(ask(&service, Path::new("")).await.unwrap().hypervisor, "qemu");
    let listed = service.list(LIMIT).await.unwrap().configurations;
    let in_force: Vec<_> =
        listed.iter().filter(|listed| listed.in_force).map(|listed| listed.hypervisor.as_str()).collect();
    assert_eq!((listed.len(), in_force), (2, vec!["qemu"]));
    running.kill().unwrap();
    running.wait().unwrap();
}

#[tokio::test]
async fn while_the_configuration_is_switched_every_call_gets_one_or_the_other_whole() {
    let host = Host::new();
    for (hypervisor, more) in [("builtin", "default_vcpus = 1"), ("qemu", "default_vcpus = 2")] {
        let shipped = host.installed(hypervisor, more);
        fs::rename(&shipped, host.path("etc").join(shipped.file_name().unwrap())).unwrap();
    }
    let mut running = start(&host, &[]);
    let service = host.service();
    let switch = async |name: &str| {
        let request = UseRequest { configuration: name.into(), ..Default::default() };
        service.use_configuration(&request, LIMIT).await.unwrap();
    };
    switch("qemu").await;
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let service = service.clone();
            tokio::spawn(async move { ask(&service, Path::new("")).await })
        })
        .collect();
    for _ in 0..10 {
        switch("builtin").await;
        switch("qemu").await;
    }
    for call in calls {
        let got = call.await.unwrap().unwrap();
        let got = (got.hypervisor.as_str(), got.vm.vcpus, got.warnings.as_slice());
        assert!([("builtin", 1, [].as_slice()), ("qemu", 2, [].as_slice())].contains(&got), "{got:?}");
    }
    running.kill().unwrap();
    running.wait().unwrap();
}

#[tokio::test]
async fn a_watcher_hears_of_every_change_and_of_nothing_else() {
    let host = Host::new();
    let file = host.configure("default_vcpus = 1");
    let (service, _started) = (host.service(), Started(&host));
    let request = WatchRequest { config_path: file.display().to_string(), ..Default::default() };
    let mut events = service.watch(&request, LIMIT).await.unwrap();
    let first = next(&mut events).await;
    assert_eq!((first.hypervisor.as_str(), first.problems.len(), first.last_good), ("qemu", 0, false));
    // Neither is part of the configuration, or changes it.
    host.write("etc/other.toml", "");
    fs::rename(host.configure_as("etc/next", "default_vcpus = 1\n# a remark"), &file).unwrap();
    host.write("etc/config.d/a.toml", "[hypervisor.qemu]\nbogus = 1");
    let second = next(&mut events).await;
    assert_eq!((second.problems.len(), second.last_good), (2, true));
    fs::remove_file(host.path("etc/config.d/a.toml")).unwrap();
    let third = next(&mut events).await;
    assert_eq!((third.problems.len(), third.last_good), (0, false));
}

async fn next(events: &mut ClientStreamReceiver<WatchEvent>) -> WatchEvent {
    tokio::time::timeout(LIMIT, events.recv()).await.expect("no event").unwrap().expect("the stream ended")
}

#[tokio::test]
async fn started_by_hand_it_makes_the_hosts_socket_and_there_is_only_one() {
    let host = Host::new();
    let file = host.configure("");
    let (service, _started) = (host.service(), Started(&host));
    let serve = || {
        let mut command = Command::new(host.path("bin/caisson-config-service"));
        command.arg("serve").env(RUN_DIR_VARIABLE, host.path("run")).stdin(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let mut first = serve().spawn().unwrap();
    let log = BufReader::new(first.stderr.take().unwrap());
    assert!(log.lines().next().unwrap().unwrap().contains("serving"));
    ask(&service, &file).await.unwrap();
    assert_eq!(services(&host).len(), 1);
    let second = serve().output().unwrap();
    let words = host.shortened(&String::from_utf8(second.stderr).unwrap());
    assert_eq!(words, "caisson-config-service: serve DIR/run/config.sock: another one serves it\n");
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn generate_writes_every_file_and_the_page() {
    let host = Host::new();
    host.service();
    let program = host.path("bin/caisson-config-service");
    let output = Command::new(program).args(["generate", "--prefix", "/opt/c"]).arg(host.path("run")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = fs::read_to_string(host.path("run/configuration-dragonball.toml")).unwrap();
    assert!(text.contains("\nkernel = \"/opt/c/share/caisson/vmlinux\"\n"), "{text}");
    assert!(fs::read_to_string(host.path("run/reference.md")).unwrap().contains("| `machine_type` |"));
}

#[test]
fn check_tells_people_and_their_scripts() {
    let host = Host::new();
    host.service();
    let file = host.configure("bogus = 1");
    let check = || Command::new(host.path("bin/caisson-config-service")).arg("check").arg(&file).output().unwrap();
    let bad = check();
    assert_eq!(bad.status.code(), Some(1));
    assert!(String::from_utf8(bad.stderr).unwrap().contains(":4:1: hypervisor.qemu.bogus: unknown key"));
    host.configure("");
    let good = check();
    assert_eq!(good.status.code(), Some(0));
    assert_eq!(String::from_utf8(good.stdout).unwrap(), format!("{}: good\n", file.display()));
}
