//! What a call can get wrong, and that the answer says what to change.

use std::{fs, os::unix::fs::PermissionsExt};

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{self, Block, CreateRequest, ExitReason, Fs, Net, VmConfig, Vsock, device::Kind},
};

use crate::fixture::{Backend, Images, LIMIT, Launcher, children, device, for_backend, for_each_backend, text};

for_each_backend!(
    an_unknown_option_is_refused_with_the_known_ones,
    a_kernel_that_is_none_is_refused,
    a_missing_hypervisor_is_named,
    a_device_that_cannot_be_had_is_unimplemented,
    no_processor_is_refused,
    more_processors_than_can_be_had_are_refused,
    a_missing_disk_is_named,
    a_tap_that_does_not_exist_is_named,
    a_socket_path_that_is_too_long_is_refused,
    a_vm_is_not_booted_before_it_is_created,
    a_vm_is_created_and_booted_once
);
for_backend!(
    qemu_only,
    Qemu,
    a_machine_that_does_not_exist_is_refused_with_those_that_do,
    a_hypervisor_that_is_something_else_is_told_in_its_own_words,
    a_processor_feature_that_does_not_exist_is_told_in_qemus_words,
    a_file_server_that_dies_is_told_in_its_own_words,
    a_program_that_is_not_qemu_has_no_capabilities
);
for_backend!(
    builtin_only,
    Builtin,
    what_a_hypervisor_is_not_made_to_do_is_unimplemented_and_no_capability,
    another_program_cannot_be_the_hypervisor,
    memory_that_the_kernel_does_not_fit_in_is_refused,
    more_memory_than_the_host_has_is_refused,
    a_truncated_initrd_is_told_by_the_guest,
    a_file_server_that_dies_is_told_in_its_own_words,
    a_share_that_the_vmm_serves_needs_no_file_server
);

/// The answer to a request that differs from a good one by `change`; afterwards the launcher has no children and no files.
async fn refusal(backend: Backend, change: impl FnOnce(&mut CreateRequest, &mut VmConfig)) -> Option<Status> {
    let images = Images::find()?;
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "poweroff");
    let mut vm = request.vm.take().unwrap();
    change(&mut request, &mut vm);
    request.vm = Some(vm).into();
    let status = launcher.create(&request).await.unwrap_err();
    assert_eq!(launcher.leftovers(), Vec::<std::path::PathBuf>::new());
    assert_eq!(children(launcher.child.id().unwrap()), Vec::<u32>::new());
    assert_eq!(launcher.wait().await.detail, status.message);
    Some(status)
}

async fn a_machine_that_does_not_exist_is_refused_with_those_that_do(backend: Backend) {
    let Some(status) = refusal(backend, |request, _| request.options = "machine_type = \"pc\"".into()).await else {
        return;
    };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.contains("unknown variant `pc`, expected `microvm` or `q35`"), "{status}");
}

async fn an_unknown_option_is_refused_with_the_known_ones(backend: Backend) {
    let Some(status) = refusal(backend, |request, _| request.options = "colour = \"red\"".into()).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    let known = match backend {
        Backend::Qemu => "`machine_type`",
        Backend::Builtin => "`file_server`",
        Backend::CloudHypervisor => "`landlock`",
        Backend::Firecracker => "`spare_writable_disks`",
        Backend::StratoVirt => "`seccomp`",
    };
    assert!(status.message.contains("`colour`") && status.message.contains(known), "{status}");
}

async fn a_kernel_that_is_none_is_refused(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.kernel = "/etc/passwd".into()).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("the guest kernel /etc/passwd is not a Linux kernel"), "{status}");
}

async fn a_missing_hypervisor_is_named(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.hypervisor_path = "/nonexistent/qemu".into()).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert_eq!(status.message, "open the hypervisor /nonexistent/qemu: No such file or directory (os error 2)");
}

async fn a_hypervisor_that_is_something_else_is_told_in_its_own_words(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.hypervisor_path = "/bin/ls".into()).await else { return };
    assert_eq!(status.code, Code::UNAVAILABLE);
    assert!(status.message.starts_with("QEMU did not start: /bin/ls (pid "), "{status}");
    assert!(status.message.contains("invalid option"), "{status}");
}

async fn a_processor_feature_that_does_not_exist_is_told_in_qemus_words(backend: Backend) {
    let change = |request: &mut CreateRequest, _: &mut VmConfig| {
        request.options = "accel = \"tcg\"\ncpu_features = \"warp=on\"".into();
    };
    let Some(status) = refusal(backend, change).await else { return };
    assert_eq!(status.code, Code::UNAVAILABLE);
    assert!(status.message.contains("warp"), "{status}");
}

async fn a_file_server_that_dies_is_told_in_its_own_words(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let broken = broken_file_server(&images);
    let change = |_: &mut CreateRequest, vm: &mut VmConfig| {
        let fs = Fs { tag: "data".into(), shared_dir: "/tmp".into(), daemon_path: text(&broken), ..Default::default() };
        vm.devices.push(device("fs", Kind::Fs(fs)));
    };
    let Some(status) = refusal(backend, change).await else { return };
    assert_eq!(status.code, Code::UNAVAILABLE);
    assert!(status.message.starts_with("the file server of share \"data\" ended: "), "{status}");
    assert!(status.message.ends_with("exited with status 4: no user namespaces here"), "{status}");
}

async fn a_device_that_cannot_be_had_is_unimplemented(backend: Backend) {
    let vfio = Kind::Vfio(vmm::Vfio { address: "0000:41:00.0".into(), ..Default::default() });
    let Some(status) = refusal(backend, |_, vm| vm.devices.push(device("gpu", vfio))).await else { return };
    assert_eq!(status.code, Code::UNIMPLEMENTED);
}

async fn a_vm_is_not_booted_before_it_is_created(backend: Backend) {
    let launcher = Launcher::start(backend).await;
    let status = launcher.boot().await.unwrap_err();
    assert_eq!(status, Status::new(Code::FAILED_PRECONDITION, "cannot boot a VM that is not created"));
}

async fn a_vm_is_created_and_booted_once(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let request = launcher.request(&images, "sleep");
    launcher.create(&request).await.unwrap();
    let twice = launcher.create(&request).await.unwrap_err();
    assert_eq!(twice, Status::new(Code::FAILED_PRECONDITION, "cannot create a VM that is created but not booted"));
    launcher.boot().await.unwrap();
    let twice = launcher.boot().await.unwrap_err();
    assert_eq!(twice, Status::new(Code::FAILED_PRECONDITION, "cannot boot a VM that is running"));
}

async fn what_a_hypervisor_is_not_made_to_do_is_unimplemented_and_no_capability(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    let resize = vmm::ResizeMemoryRequest { memory_mib: 512, ..Default::default() };
    let status = Status::from(launcher.client.resize_memory(deadline(LIMIT), &resize).await.unwrap_err());
    let sentence = format!("changing the amount of memory is not supported with {}", backend.name());
    assert_eq!(status, Status::new(Code::UNIMPLEMENTED, sentence));
    let able = launcher.client.capabilities(deadline(LIMIT), &vmm::CapabilitiesRequest::new()).await.unwrap();
    assert!(!able.operations.iter().any(|operation| operation == "resize-memory"));
    assert!(!able.accelerator_reason.is_empty());
}

async fn no_processor_is_refused(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.vcpus = 0).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("0 vCPUs cannot be had: 1 to "), "{status}");
}

async fn more_processors_than_can_be_had_are_refused(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.vcpus = 4096).await else { return };
    assert!(status.message.starts_with("4096 vCPUs cannot be had: 1 to "), "{status}");
}

async fn a_missing_disk_is_named(backend: Backend) {
    let disk = Kind::Block(Block { path: "/nonexistent/disk".into(), ..Default::default() });
    let Some(status) = refusal(backend, |_, vm| vm.devices.push(device("data", disk))).await else { return };
    assert_eq!(status.message, "open the disk /nonexistent/disk: No such file or directory (os error 2)");
}

async fn a_tap_that_does_not_exist_is_named(backend: Backend) {
    let net = Net { tap: "notap9".into(), mac: "02:00:00:00:12:34".into(), ..Default::default() };
    let Some(status) = refusal(backend, |_, vm| vm.devices.push(device("net", Kind::Net(net)))).await else { return };
    assert_eq!(status.message, "there is no network interface notap9");
}

async fn a_socket_path_that_is_too_long_is_refused(backend: Backend) {
    let vsock = Vsock { socket: format!("/{}", "s".repeat(96)), ..Default::default() };
    let Some(status) = refusal(backend, |_, vm| vm.devices.push(device("vsock", Kind::Vsock(vsock)))).await else {
        return;
    };
    assert!(status.message.ends_with("is too long: 97 bytes, at most 96"), "{status}");
}

async fn another_program_cannot_be_the_hypervisor(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.hypervisor_path = "/bin/true".into()).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("/bin/true cannot be the hypervisor: the built-in VMM is"), "{status}");
}

async fn memory_that_the_kernel_does_not_fit_in_is_refused(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.memory_mib = 16).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("16 MiB of memory are too small for the guest kernel /"), "{status}");
}

async fn more_memory_than_the_host_has_is_refused(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.memory_mib = 1 << 30).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("1073741824 MiB of memory cannot be had: this machine has "), "{status}");
}

/// Only the guest unpacks it.
async fn a_truncated_initrd_is_told_by_the_guest(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let truncated = fs::OpenOptions::new().write(true).open(&images.initrd).unwrap();
    truncated.set_len(truncated.metadata().unwrap().len() / 2).unwrap();
    launcher.create(&launcher.request(&images, "poweroff")).await.unwrap();
    launcher.boot().await.unwrap();
    let exit = launcher.wait().await;
    assert_eq!(exit.reason, ExitReason::GUEST_PANIC.into(), "{exit}");
    assert!(exit.detail.starts_with("the guest kernel panicked: "), "{exit}");
    assert!(exit.detail.contains("; its initrd is "), "{exit}");
}

async fn a_share_that_the_vmm_serves_needs_no_file_server(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.options = "file_server = \"builtin\"".into();
    let fs = Fs { tag: "data".into(), shared_dir: "/tmp".into(), daemon_path: "/no/d".into(), ..Default::default() };
    request.vm.as_mut().unwrap().devices = vec![device("fs", Kind::Fs(fs))];
    launcher.create(&request).await.unwrap();
}

/// A program that says why it ends.
fn broken_file_server(images: &Images) -> std::path::PathBuf {
    let broken = images.dir.path().join("broken");
    fs::write(&broken, "#!/bin/sh\necho no user namespaces here >&2\nexit 4\n").unwrap();
    fs::set_permissions(&broken, PermissionsExt::from_mode(0o755)).unwrap();
    broken
}

async fn a_program_that_is_not_qemu_has_no_capabilities(backend: Backend) {
    let launcher = Launcher::start(backend).await;
    let request = vmm::CapabilitiesRequest { hypervisor_path: "/bin/true".into(), ..Default::default() };
    let status = Status::from(launcher.client.capabilities(deadline(LIMIT), &request).await.unwrap_err());
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("/bin/true is not QEMU"), "{status}");
}
