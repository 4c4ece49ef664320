//! What a call can get wrong, and that the answer says what to change.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{self, Block, CreateRequest, ExitReason, Fs, Net, VmConfig, Vsock, device::Kind},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::fixture::{Backend, Images, LIMIT, Launcher, children, device, for_backend, for_each_backend, text};

for_each_backend!(
    an_unknown_option_is_refused_with_the_known_ones,
    a_kernel_that_is_none_is_refused,
    a_missing_hypervisor_is_named,
    no_processor_is_refused,
    more_processors_than_can_be_had_are_refused,
    a_missing_disk_is_named,
    a_tap_that_does_not_exist_is_named,
    a_socket_path_that_is_too_long_is_refused,
    a_vm_is_not_booted_before_it_is_created,
    a_vm_is_created_and_booted_once,
    a_missing_initrd_is_named,
    too_little_memory_is_refused,
    two_devices_with_one_name_are_refused,
    a_host_whose_kvm_is_broken_is_told
);
for_backend!(
    qemu_only,
    Qemu,
    a_device_that_cannot_be_had_is_unimplemented,
    a_device_of_the_host_that_is_not_there_is_named,
    a_machine_that_does_not_exist_is_refused_with_those_that_do,
    a_hypervisor_that_is_something_else_is_told_in_its_own_words,
    a_processor_feature_that_does_not_exist_is_told_in_qemus_words,
    a_file_server_that_dies_is_told_in_its_own_words
);
for_backend!(
    builtin_only,
    Builtin,
    a_device_that_cannot_be_had_is_unimplemented,
    what_a_hypervisor_is_not_made_to_do_is_unimplemented_and_no_capability,
    another_program_cannot_be_the_hypervisor,
    memory_that_the_kernel_does_not_fit_in_is_refused,
    more_memory_than_the_host_has_is_refused,
    a_truncated_initrd_is_told_by_the_guest,
    a_file_server_that_dies_is_told_in_its_own_words,
    a_share_that_the_vmm_serves_needs_no_file_server
);

for_backend!(cloud_hypervisor_only, CloudHypervisor, a_device_of_the_host_that_is_not_there_is_named);
for_backend!(firecracker_only, Firecracker, a_device_that_cannot_be_had_is_unimplemented);
for_backend!(
    stratovirt_only,
    StratoVirt,
    a_device_that_cannot_be_had_is_unimplemented,
    an_uncompressed_kernel_is_refused
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
    let Some(status) = refusal(backend, |_, vm| vm.devices.push(device("gpu", host_device()))).await else { return };
    assert_eq!(status.code, Code::UNIMPLEMENTED);
}

async fn a_device_of_the_host_that_is_not_there_is_named(backend: Backend) {
    let change = |request: &mut CreateRequest, vm: &mut VmConfig| {
        if backend == Backend::Qemu {
            request.options += "\nmachine_type = \"q35\"";
        }
        vm.devices.push(device("gpu", host_device()));
    };
    let Some(status) = refusal(backend, change).await else { return };
    assert_eq!(status, Status::new(Code::INVALID_ARGUMENT, "there is no PCI device ffff:41:00.0"));
}

/// On no machine.
fn host_device() -> Kind {
    Kind::Vfio(vmm::Vfio { address: "ffff:41:00.0".into(), ..Default::default() })
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

async fn a_missing_initrd_is_named(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.initrd = "/nonexistent/initrd".into()).await else { return };
    assert_eq!(status.message, "open the initrd /nonexistent/initrd: No such file or directory (os error 2)");
}

async fn too_little_memory_is_refused(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.memory_mib = 8).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("8 MiB of memory cannot be had: 16 to "), "{status}");
}

async fn two_devices_with_one_name_are_refused(backend: Backend) {
    let disk = || Kind::Block(Block { path: "/bin/sh".into(), read_only: true, ..Default::default() });
    let change = |_: &mut CreateRequest, vm: &mut VmConfig| {
        vm.devices.extend([device("data", disk()), device("data", disk())]);
    };
    let Some(status) = refusal(backend, change).await else { return };
    assert_eq!(status, Status::new(Code::INVALID_ARGUMENT, "two devices are called \"data\""));
}

/// Its `/dev/kvm` is something else, for this thread and the launcher that it starts.
async fn a_host_whose_kvm_is_broken_is_told(backend: Backend) {
    if !Path::new("/dev/kvm").exists() {
        return;
    }
    let nothing = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(nothing, "/", nothing, MsFlags::MS_PRIVATE | MsFlags::MS_REC, nothing).unwrap();
    mount(Some("/dev/null"), "/dev/kvm", nothing, MsFlags::MS_BIND, nothing).unwrap();
    let change = |request: &mut CreateRequest, _: &mut VmConfig| {
        if backend == Backend::Qemu {
            request.options = "accel = \"kvm\"".into();
        }
    };
    let Some(status) = refusal(backend, change).await else { return };
    match backend {
        // It asks for no more than it needs itself.
        Backend::Builtin => assert!(status.message.starts_with("make a VM with /dev/kvm: "), "{status}"),
        Backend::Qemu | Backend::CloudHypervisor | Backend::Firecracker | Backend::StratoVirt => {
            assert_eq!(status.code, Code::INVALID_ARGUMENT);
            assert!(status.message.contains("cannot be used on this machine: /dev/kvm "), "{status}");
        }
    }
}

async fn an_uncompressed_kernel_is_refused(backend: Backend) {
    let Some(status) = refusal(backend, |_, vm| vm.kernel = vm.kernel.replace("bzImage", "vmlinux")).await else {
        return;
    };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.ends_with("is a vmlinux; StratoVirt's microvm boots a bzImage"), "{status}");
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
    assert!(status.message.starts_with("there is no network interface notap9: make it with "), "{status}");
    assert!(nix::net::if_::if_nametoindex("notap9").is_err());
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
