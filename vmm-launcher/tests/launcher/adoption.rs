//! A launcher is killed, and another one goes on with its VM.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use caisson_protocol::{
    deadline,
    processes::{ProcessId, ProcessList},
    status::{Code, Status},
    vmm::{self, AdoptResponse, CreateRequest, ExitReason, Fs, VmState, Vsock, device::Kind},
};
use nix::sys::{
    prctl::set_child_subreaper,
    signal::{Signal, kill},
};
use serde_json::Value;

use crate::{
    cards::{self, cards_at},
    fixture::{Backend, Images, LIMIT, Launcher, device, for_backend, for_each_backend, pid, process_ended, text},
    network,
};

for_each_backend!(
    a_killed_launchers_vm_goes_on_or_ends_as_it_was_told,
    a_vm_that_ended_while_nobody_watched_is_told_with_its_end,
    a_created_vm_is_booted_by_another_launcher,
    devices_of_an_adopted_vm_come_and_go,
    a_vm_whose_launcher_was_killed_is_ended_by_its_list,
);
for_backend!(
    qemu_only,
    Qemu,
    a_state_that_cannot_be_trusted_is_refused_and_nobody_is_ended,
    what_a_vm_must_not_be_adopted_by_is_refused,
    a_second_vm_is_not_made_where_there_is_one,
    a_vm_that_cannot_be_made_leaves_no_sockets,
    a_card_of_an_adopted_vm_goes_and_comes,
);
for_backend!(cloud_hypervisor_only, CloudHypervisor, a_card_of_an_adopted_vm_goes_and_comes);
for_backend!(builtin_only, Builtin, a_launcher_that_is_the_vm_says_so);

/// Its console is logged, and it has whatever the backend needs helpers for.
fn outliving(launcher: &Launcher, images: &Images, what: &str) -> CreateRequest {
    let mut request = launcher.request(images, what);
    let mut devices = vec![launcher.logged_console()];
    if launcher.backend.shares_directories() {
        let fs = Fs {
            tag: "share".into(),
            shared_dir: "/tmp".into(),
            daemon_path: text(&images.virtiofsd),
            ..Default::default()
        };
        devices.push(device("fs", Kind::Fs(fs)));
    }
    if launcher.backend != Backend::StratoVirt {
        let socket = launcher.dir.path().join("vsock.sock");
        devices.push(device("vsock", Kind::Vsock(Vsock { socket: text(&socket), ..Default::default() })));
    }
    request.vm.as_mut().unwrap().devices = devices;
    // As a shim is: how a hypervisor without a launcher has ended can be read until its parent asks, and that is never.
    set_child_subreaper(true).unwrap();
    request.state_dir = text(launcher.dir.path());
    request
}

fn outlives_its_launcher(backend: Backend) -> bool {
    backend != Backend::Builtin
}

/// Kills the launcher, and starts another one in its place.
async fn replace(launcher: &mut Launcher) {
    launcher.signal(Signal::SIGKILL);
    launcher.ended().await;
    launcher.start_again().await;
}

async fn adopt(launcher: &Launcher) -> Result<AdoptResponse, Status> {
    let request = vmm::AdoptRequest { state_dir: text(launcher.dir.path()), ..Default::default() };
    launcher.client.adopt(deadline(LIMIT), &request).await.map_err(Status::from)
}

async fn a_killed_launchers_vm_goes_on_or_ends_as_it_was_told(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let mut launcher = Launcher::start(backend).await;
    let mut request = outliving(&launcher, &images, "tick");
    request.options.push_str(backend.pausable());
    let created = launcher.create(&request).await.unwrap();
    assert_eq!(created.outlives_launcher, outlives_its_launcher(backend));
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: tick").await;
    if !created.outlives_launcher {
        launcher.signal(Signal::SIGKILL);
        launcher.ended().await;
        return process_ended(created.pid).await;
    }

    replace(&mut launcher).await;
    let adopted = adopt(&launcher).await.unwrap();

    assert_eq!((adopted.pid, adopted.state), (created.pid, VmState::RUNNING.into()));
    assert_eq!(adopted.devices, created.devices);
    let before = launcher.state().await;
    assert_eq!((before.pid, before.state), (created.pid, VmState::RUNNING.into()));
    assert!(before.console_tail.contains("guest: up"), "{before}");
    let metrics = launcher.client.metrics(deadline(LIMIT), &vmm::MetricsRequest::new()).await.unwrap();
    assert!(metrics.text.contains("caisson_vm_vcpus 1\n"), "{}", metrics.text);
    launcher.client.pause(deadline(LIMIT), &vmm::PauseRequest::new()).await.unwrap();

    // Once more, while it is paused: the guest ticks again only when the third launcher lets it.
    replace(&mut launcher).await;
    assert_eq!(adopt(&launcher).await.unwrap().state, VmState::PAUSED.into());
    let heard = launcher.heard();
    let last: u32 = heard.lines().rev().find_map(|line| line.strip_prefix("guest: tick ")?.parse().ok()).unwrap();
    launcher.client.resume(deadline(LIMIT), &vmm::ResumeRequest::new()).await.unwrap();
    // One may have been on its way when its listener was killed.
    launcher.until_console_has(&format!("guest: tick {}", last + 2)).await;
    assert_eq!(launcher.heard().matches("guest: up").count(), 1);
    launcher.stop(Duration::ZERO).await;
    assert_eq!(launcher.wait().await.reason, ExitReason::STOPPED.into());
    assert!(!process_is_there(created.pid));
    assert_eq!(launcher.leftovers(), Vec::<PathBuf>::new());
    for name in ["state.json", "processes", "qmp.sock", "console.sock", "api.sock", "vsock.sock"] {
        assert!(!launcher.dir.path().join(name).exists(), "{name}");
    }
}

async fn a_vm_that_ended_while_nobody_watched_is_told_with_its_end(backend: Backend) {
    let Some(images) = Images::find() else { return };
    if !outlives_its_launcher(backend) {
        return;
    }
    let mut launcher = Launcher::start(backend).await;
    let request = outliving(&launcher, &images, "sleep");
    let created = launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.signal(Signal::SIGKILL);
    launcher.ended().await;
    kill(pid(created.pid), Signal::SIGKILL).unwrap();
    process_ended(created.pid).await;

    launcher.start_again().await;
    let adopted = adopt(&launcher).await.unwrap();

    assert_eq!(adopted.state, VmState::EXITED.into());
    let exit = launcher.wait().await;
    assert_eq!(exit.reason, ExitReason::HYPERVISOR_FAILED.into(), "{exit}");
    assert!(exit.detail.ends_with(&format!("(pid {}) was killed by SIGKILL", created.pid)), "{exit}");
    assert_eq!(launcher.state().await.state, VmState::EXITED.into());
    assert!(!launcher.dir.path().join("processes").exists());
}

async fn a_created_vm_is_booted_by_another_launcher(backend: Backend) {
    let Some(images) = Images::find() else { return };
    if !outlives_its_launcher(backend) {
        return;
    }
    let mut launcher = Launcher::start(backend).await;
    let request = outliving(&launcher, &images, "poweroff");
    launcher.create(&request).await.unwrap();

    replace(&mut launcher).await;

    assert_eq!(adopt(&launcher).await.unwrap().state, VmState::CREATED.into());
    launcher.boot().await.unwrap();
    let exit = launcher.wait().await;
    assert_eq!((exit.reason, exit.detail.as_str()), (ExitReason::GUEST_SHUTDOWN.into(), backend.powered_off()));
    assert!(exit.console_tail.contains("guest: up"), "{exit}");
}

async fn devices_of_an_adopted_vm_come_and_go(backend: Backend) {
    let Some(images) = Images::find() else { return };
    if !outlives_its_launcher(backend) {
        return;
    }
    let mut launcher = Launcher::start(backend).await;
    let mut request = outliving(&launcher, &images, "watch-sizes");
    request.options.push_str(match backend {
        Backend::Qemu => "\nmachine_type = \"q35\"\nhotplug_slots = 1",
        Backend::Firecracker => "\nspare_read_only_disks = 1",
        _ => "",
    });
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: sizes").await;
    let disk = images.dir.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(3 << 20).unwrap();
    let block = vmm::Block { path: text(&disk), read_only: true, ..Default::default() };
    let attach = |id: &str| vmm::AttachRequest {
        device: Some(device(id, Kind::Block(block.clone()))).into(),
        ..Default::default()
    };
    launcher.client.attach(deadline(LIMIT), &attach("one")).await.unwrap();
    launcher.until_console_has("6144").await;

    replace(&mut launcher).await;
    adopt(&launcher).await.unwrap();

    // The other launcher knows what is attached, and gives the place to another disk when that is gone.
    let twice = launcher.client.attach(deadline(LIMIT), &attach("one")).await.unwrap_err();
    assert_eq!(Status::from(twice).code, Code::INVALID_ARGUMENT);
    let detach = vmm::DetachRequest { id: "one".into(), ..Default::default() };
    launcher.client.detach(deadline(LIMIT), &detach).await.unwrap();
    launcher.client.attach(deadline(LIMIT), &attach("two")).await.unwrap();
    launcher.stop(Duration::ZERO).await;
}

async fn a_card_of_an_adopted_vm_goes_and_comes(backend: Backend) {
    let Some(images) = Images::find() else { return };
    network::make(&[]);
    let mut launcher = Launcher::start(backend).await;
    let mut request = outliving(&launcher, &images, "watch-cards");
    if backend == Backend::Qemu {
        request.options.push_str("\nmachine_type = \"q35\"");
    }
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has(&cards_at(1)).await;
    cards::attach(&launcher, "tap0").await.unwrap();
    launcher.until_console_has(&cards_at(2)).await;

    replace(&mut launcher).await;
    adopt(&launcher).await.unwrap();
    cards::detach(&launcher).await.unwrap();
    launcher.until_console_has(&cards_at(3)).await;
    cards::attach(&launcher, "tap0").await.unwrap();

    launcher.until_console_has(&cards_at(4)).await;
    launcher.stop(Duration::ZERO).await;
}

async fn a_vm_whose_launcher_was_killed_is_ended_by_its_list(backend: Backend) {
    let Some(images) = Images::find() else { return };
    if !outlives_its_launcher(backend) {
        return;
    }
    let mut launcher = Launcher::start(backend).await;
    let request = outliving(&launcher, &images, "sleep");
    let created = launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    let list = ProcessList::in_dir(launcher.dir.path());
    let processes = list.read().unwrap();
    assert!(processes.contains(&ProcessId::of(created.pid).unwrap()));
    launcher.signal(Signal::SIGKILL);
    launcher.ended().await;

    tokio::task::spawn_blocking(move || list.end_all(LIMIT)).await.unwrap().unwrap();

    for process in processes {
        process_ended(process.pid).await;
    }
}

async fn a_state_that_cannot_be_trusted_is_refused_and_nobody_is_ended(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let mut launcher = Launcher::start(backend).await;
    let request = outliving(&launcher, &images, "sleep");
    let created = launcher.create(&request).await.unwrap();
    replace(&mut launcher).await;
    let path = launcher.dir.path().join("state.json");
    let state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let changed = |pointer: &str, value: Value| {
        let mut changed = state.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        changed.to_string()
    };
    let path_text = text(&path);
    let refusals = [
        ("no state".to_owned(), "it is damaged: "),
        (state.to_string()[..40].to_owned(), "it is damaged: "),
        (changed("/version", 0.into()), "a launcher of another version wrote it"),
        (changed("/boot_id", "another".into()), "the host was started since"),
        (changed("/hypervisor", "firecracker".into()), "its VM is one of firecracker"),
    ];
    for (content, why) in refusals {
        fs::write(&path, content).unwrap();
        let refusal = adopt(&launcher).await.unwrap_err();
        assert_eq!(refusal.code, Code::INVALID_ARGUMENT, "{refusal:?}");
        assert!(refusal.message.starts_with(&format!("{path_text} cannot be used: {why}")), "{refusal:?}");
        assert_eq!(launcher.state().await.state, VmState::EMPTY.into());
    }
    fs::write(&path, state.to_string()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o622)).unwrap();
    let refusal = adopt(&launcher).await.unwrap_err();
    assert!(
        refusal.message.starts_with(&format!("open the state of the VM {path_text}: it is no file that only user"))
    );
    assert!(process_is_there(created.pid));

    // With the state as it was, nothing is lost.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(adopt(&launcher).await.unwrap().state, VmState::CREATED.into());
}

async fn what_a_vm_must_not_be_adopted_by_is_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let mut launcher = Launcher::start(backend).await;
    let nothing = adopt(&launcher).await.unwrap_err();
    assert!(nothing.message.starts_with("open the state of the VM "), "{nothing:?}");
    let request = outliving(&launcher, &images, "sleep");
    let created = launcher.create(&request).await.unwrap();
    let own = adopt(&launcher).await.unwrap_err();
    assert_eq!(own, Status::new(Code::FAILED_PRECONDITION, "cannot adopt a VM that is created but not booted"));
    replace(&mut launcher).await;

    // The number of the hypervisor now belongs to somebody else, as far as the state says.
    let path = launcher.dir.path().join("state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["memory"]["process"]["start_ticks"] = 1.into();
    fs::write(&path, state.to_string()).unwrap();
    let list = ProcessList::in_dir(launcher.dir.path());
    list.remove();
    drop(list.create().unwrap());
    assert_eq!(adopt(&launcher).await.unwrap().state, VmState::EXITED.into());
    assert!(process_is_there(created.pid));
    kill(pid(created.pid), Signal::SIGKILL).unwrap();
}

async fn a_second_vm_is_not_made_where_there_is_one(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let mut launcher = Launcher::start(backend).await;
    let request = outliving(&launcher, &images, "sleep");
    launcher.create(&request).await.unwrap();
    replace(&mut launcher).await;
    let refusal = launcher.create(&request).await.unwrap_err();
    let expected = format!(
        "{} has the VM of another launcher: adopt it, or end it and remove what is there",
        launcher.dir.path().display()
    );
    assert_eq!(refusal, Status::new(Code::INVALID_ARGUMENT, &expected));
    assert_eq!(adopt(&launcher).await.unwrap().state, VmState::CREATED.into());
    let mut visible = launcher.request(&images, "sleep");
    visible.state_dir = format!("{}/state", visible.run_dir);
    let visible = Launcher::start(backend).await.create(&visible).await.unwrap_err();
    assert!(visible.message.contains("which the hypervisor sees"), "{visible:?}");
}

async fn a_vm_that_cannot_be_made_leaves_no_sockets(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = outliving(&launcher, &images, "sleep");
    let card = vmm::Vfio { address: "0000:00:1f.0".into(), ..Default::default() };
    request.vm.as_mut().unwrap().devices.push(device("card", Kind::Vfio(card)));
    launcher.create(&request).await.unwrap_err();
    for name in ["qmp.sock", "console.sock"] {
        assert!(!launcher.dir.path().join(name).exists(), "{name}");
    }
}

async fn a_launcher_that_is_the_vm_says_so(backend: Backend) {
    let launcher = Launcher::start(backend).await;
    let refusal = adopt(&launcher).await.unwrap_err();
    assert_eq!(refusal.code, Code::UNIMPLEMENTED, "{refusal:?}");
    assert_eq!(refusal.message, "a VM of builtin cannot be adopted: the launcher is the VM and ends with it");
}

fn process_is_there(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
