//! The service as shims meet it: started on demand, shared, surviving its own death.

mod host;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use caisson_config_service::client::ConfigService;
use caisson_protocol::{
    config::{CheckRequest, ShowRequest},
    config_ttrpc::ConfigClient,
    deadline, listen,
};
use host::{Host, LIMIT, ask};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ttrpc::asynchronous::Client;

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

#[test]
fn started_by_hand_it_says_what_is_missing() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_caisson-config-service")).arg("serve").stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(words, "caisson-config-service: standard input is not a listening socket\n");
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
