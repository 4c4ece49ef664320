//! How a VM is made and ends, and that nothing of it stays.

use std::time::Duration;

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{self, ExitReason, Fs, VmState, device::Kind},
};
use nix::sys::{
    ptrace,
    signal::{Signal, kill},
    wait::{WaitPidFlag, waitpid},
};

use crate::fixture::{
    Backend, Images, LIMIT, Launcher, children, device, for_backend, for_each_backend, pid, process_ended, text,
};

for_each_backend!(
    a_guest_that_powers_off_ends_its_vm,
    a_guest_that_reboots_ends_its_vm,
    a_panic_is_told_with_its_last_words,
    a_paused_guest_goes_on_when_it_is_resumed,
    stop_ends_a_running_guest_and_may_be_called_again,
    stop_without_a_vm_ends_it_before_it_is_made,
    a_killed_launcher_leaves_no_process,
    a_launcher_that_is_told_to_end_ends_its_vm_first,
);
for_backend!(
    qemu_only,
    Qemu,
    stop_ends_a_create_that_hangs_and_leaves_nothing,
    a_hypervisor_that_is_killed_is_told_with_the_signal
);
for_backend!(stratovirt_only, StratoVirt, a_pause_that_would_end_the_hypervisor_is_unimplemented);
for_backend!(
    builtin_only,
    Builtin,
    stop_ends_a_create_that_hangs_and_leaves_nothing,
    a_guest_has_the_processors_and_the_memory_that_it_was_given,
    a_forbidden_system_call_ends_the_vm_and_is_told
);

async fn a_guest_that_powers_off_ends_its_vm(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "poweroff");
    request.vm.as_mut().unwrap().devices = vec![launcher.logged_console()];
    assert_eq!(launcher.state().await.state, VmState::EMPTY.into());
    let created = launcher.create(&request).await.unwrap();
    match backend {
        Backend::Builtin => assert_eq!(launcher.child.id(), Some(created.pid)),
        Backend::Qemu | Backend::CloudHypervisor | Backend::Firecracker | Backend::StratoVirt => {
            assert_eq!(children(launcher.child.id().unwrap()), [created.pid]);
        }
    }
    assert_eq!(launcher.state().await.state, VmState::CREATED.into());
    launcher.boot().await.unwrap();

    let exit = launcher.wait().await;

    assert_eq!(exit.reason, ExitReason::GUEST_SHUTDOWN.into(), "{exit}");
    assert_eq!(exit.detail, backend.powered_off());
    assert!(exit.console_tail.contains("guest: up"), "{exit}");
    assert!(launcher.heard().contains("guest: up"));
    assert_eq!(launcher.state().await.state, VmState::EXITED.into());
    assert!(launcher.leftovers().is_empty());
}

async fn a_guest_that_reboots_ends_its_vm(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "reboot")).await.unwrap();
    launcher.boot().await.unwrap();
    let exit = launcher.wait().await;
    assert_eq!(exit.reason, ExitReason::GUEST_SHUTDOWN.into(), "{exit}");
    assert_eq!(exit.detail, backend.rebooted());
}

async fn a_panic_is_told_with_its_last_words(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "panic")).await.unwrap();
    launcher.boot().await.unwrap();
    let exit = launcher.wait().await;
    assert_eq!(exit.reason, ExitReason::GUEST_PANIC.into(), "{exit}");
    assert_eq!(exit.detail, "the guest kernel panicked: sysrq triggered crash");
    assert!(exit.console_tail.contains("Kernel panic"), "{exit}");
}

async fn a_paused_guest_goes_on_when_it_is_resumed(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "poweroff");
    request.options += backend.pausable();
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.client.pause(deadline(LIMIT), &vmm::PauseRequest::new()).await.unwrap();
    assert_eq!(launcher.state().await.state, VmState::PAUSED.into());
    let again = launcher.client.pause(deadline(LIMIT), &vmm::PauseRequest::new()).await.unwrap_err();
    assert_eq!(Status::from(again), Status::new(Code::FAILED_PRECONDITION, "cannot pause a VM that is paused"));
    launcher.client.resume(deadline(LIMIT), &vmm::ResumeRequest::new()).await.unwrap();
    assert_eq!(launcher.wait().await.reason, ExitReason::GUEST_SHUTDOWN.into());
}

async fn a_pause_that_would_end_the_hypervisor_is_unimplemented(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "tick");
    request.vm.as_mut().unwrap().devices = vec![launcher.logged_console()];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    let refusal = Status::from(launcher.client.pause(deadline(LIMIT), &vmm::PauseRequest::new()).await.unwrap_err());
    assert_eq!(refusal.code, Code::UNIMPLEMENTED);
    assert!(refusal.message.contains("seccomp = false"), "{refusal}");
    launcher.until_console_has("guest: tick").await;
    let able = launcher.client.capabilities(deadline(LIMIT), &launcher.capabilities()).await.unwrap();
    assert!(!able.operations.contains(&"pause".to_owned()), "{able}");
    assert_eq!(able.missing["pause"], refusal.message);
}

async fn stop_ends_a_running_guest_and_may_be_called_again(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.stop(Duration::ZERO).await;
    launcher.stop(Duration::ZERO).await;
    assert_eq!(launcher.wait().await.reason, ExitReason::STOPPED.into());
    assert_eq!(children(launcher.child.id().unwrap()), Vec::<u32>::new());
    assert!(launcher.leftovers().is_empty());
}

async fn stop_without_a_vm_ends_it_before_it_is_made(backend: Backend) {
    let launcher = Launcher::start(backend).await;
    launcher.stop(Duration::ZERO).await;
    let late = launcher.create(&vmm::CreateRequest::new()).await.unwrap_err();
    assert_eq!(late, Status::new(Code::FAILED_PRECONDITION, "cannot create a VM that is ended"));
}

async fn stop_ends_a_create_that_hangs_and_leaves_nothing(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    // A hypervisor waits for an answer of its file server for as long as it has one.
    let mute = images.dir.path().join("mute");
    std::fs::write(&mute, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    std::fs::set_permissions(&mute, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let fs = Fs { tag: "share".into(), shared_dir: "/tmp".into(), daemon_path: text(&mute), ..Default::default() };
    request.vm.as_mut().unwrap().devices = vec![device("fs", Kind::Fs(fs))];

    let (created, ()) = tokio::join!(launcher.create(&request), async {
        // Calls on one connection arrive in order, and `create` has begun before `stop` is read.
        tokio::task::yield_now().await;
        launcher.stop(Duration::ZERO).await;
    });

    let status = created.unwrap_err();
    assert_eq!(status, Status::new(Code::CANCELLED, "the VM was stopped while it was being created"));
    assert!(launcher.leftovers().is_empty());
    for child in children(launcher.child.id().unwrap()) {
        process_ended(child).await;
    }
    assert_eq!(launcher.wait().await.reason, ExitReason::STOPPED.into());
}

async fn a_hypervisor_that_is_killed_is_told_with_the_signal(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let created = launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    launcher.boot().await.unwrap();
    kill(pid(created.pid), Signal::SIGKILL).unwrap();
    let exit = launcher.wait().await;
    assert_eq!(exit.reason, ExitReason::HYPERVISOR_FAILED.into(), "{exit}");
    assert!(exit.detail.ends_with("was killed by SIGKILL"), "{exit}");
}

async fn a_killed_launcher_leaves_no_process(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let mut launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    if backend.shares_directories() {
        let fs = Fs {
            tag: "share".into(),
            shared_dir: "/tmp".into(),
            daemon_path: text(&images.virtiofsd),
            ..Default::default()
        };
        request.vm.as_mut().unwrap().devices = vec![device("fs", Kind::Fs(fs))];
    }
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    let children = children(launcher.child.id().unwrap());
    assert!(!children.is_empty());
    launcher.signal(Signal::SIGKILL);
    launcher.ended().await;
    for child in children {
        process_ended(child).await;
    }
}

async fn a_launcher_that_is_told_to_end_ends_its_vm_first(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let mut launcher = Launcher::start(backend).await;
    let created = launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.signal(Signal::SIGTERM);
    assert!(launcher.ended().await.success());
    assert!(!std::path::Path::new(&format!("/proc/{}", created.pid)).exists());
    assert!(launcher.leftovers().is_empty());
}

async fn a_forbidden_system_call_ends_the_vm_and_is_told(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let mut launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.vm.as_mut().unwrap().devices = vec![launcher.logged_console()];
    let created = launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: up").await;

    make_thread_call(created.pid, "vcpu0", GETPPID);

    let exit = launcher.wait().await;
    assert_eq!(exit.reason, ExitReason::HYPERVISOR_FAILED.into(), "{exit}");
    let words = "the VMM's thread vcpu0 made system call 110, which its seccomp filter forbids";
    assert!(exit.detail.starts_with(words), "{exit}");
    assert!(launcher.leftovers().is_empty());
    launcher.signal(Signal::SIGTERM);
    assert!(launcher.ended().await.success());
}

/// A harmless one that no thread of a guest's has a use for; its number on x86-64.
const GETPPID: u64 = 110;

/// Has a thread of process `number` that waits in a system call make another one, as a debugger does: as if something in
/// the guest had gained hold of it.
fn make_thread_call(number: u32, name: &str, call: u64) {
    let tasks = std::fs::read_dir(format!("/proc/{number}/task")).unwrap();
    let is_it = |task: &std::path::PathBuf| std::fs::read_to_string(task.join("comm")).unwrap().trim() == name;
    let task = tasks.map(|task| task.unwrap().path()).find(is_it).unwrap();
    let thread = pid(task.file_name().unwrap().to_str().unwrap().parse().unwrap());
    ptrace::seize(thread, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
    let mut registers = ptrace::getregs(thread).unwrap();
    // Back to the instruction that has entered the kernel, which is two bytes long, and not into the same call.
    registers.rip -= 2;
    (registers.rax, registers.orig_rax) = (call, u64::MAX);
    ptrace::setregs(thread, registers).unwrap();
    ptrace::detach(thread, None).unwrap();
}

/// From the smallest to one that has memory above 4 GiB. More than the host has cannot be had.
async fn a_guest_has_the_processors_and_the_memory_that_it_was_given(backend: Backend) {
    let Some(images) = Images::find() else { return };
    for (vcpus, memory_mib) in [(1, 128), (2, 512), (8, 3584)] {
        let launcher = Launcher::start(backend).await;
        let mut request = launcher.request(&images, "size");
        let vm = request.vm.as_mut().unwrap();
        (vm.vcpus, vm.memory_mib) = (vcpus, memory_mib);
        launcher.create(&request).await.unwrap();
        launcher.boot().await.unwrap();
        let exit = launcher.wait().await;
        let told =
            exit.console_tail.lines().find_map(|line| line.strip_prefix("guest: ")?.strip_suffix(" MiB")).unwrap();
        let (processors, usable) = told.split_once(" processors, ").unwrap();
        assert_eq!(processors.parse(), Ok(vcpus), "{exit}");
        let usable: u64 = usable.parse().unwrap();
        // The kernel keeps some for itself.
        assert!((memory_mib * 3 / 5..memory_mib).contains(&usable), "{exit}");
    }
}
