//! What a call can get wrong, and that the answer says what to change.

use std::{fs, os::unix::fs::PermissionsExt};

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{self, CreateRequest, Fs, VmConfig, device::Kind},
};

use crate::fixture::{Images, LIMIT, Launcher, children, device, text};

/// The answer to a request that differs from a good one by `change`; afterwards the launcher has no children and no files.
async fn refusal(change: impl FnOnce(&mut CreateRequest, &mut VmConfig)) -> Option<Status> {
    let images = Images::find()?;
    let launcher = Launcher::start().await;
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

#[tokio::test]
async fn a_machine_that_does_not_exist_is_refused_with_those_that_do() {
    let Some(status) = refusal(|request, _| request.options = "machine_type = \"pc\"".into()).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.contains("unknown variant `pc`, expected `microvm` or `q35`"), "{status}");
}

#[tokio::test]
async fn an_unknown_option_is_refused_with_the_known_ones() {
    let Some(status) = refusal(|request, _| request.options = "machine = \"q35\"".into()).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.contains("`machine`") && status.message.contains("`machine_type`"), "{status}");
}

#[tokio::test]
async fn a_kernel_that_is_none_is_refused() {
    let Some(status) = refusal(|_, vm| vm.kernel = "/etc/passwd".into()).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("the guest kernel /etc/passwd is not a Linux kernel"), "{status}");
}

#[tokio::test]
async fn a_missing_hypervisor_is_named() {
    let Some(status) = refusal(|_, vm| vm.hypervisor_path = "/nonexistent/qemu".into()).await else { return };
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert_eq!(status.message, "open the hypervisor /nonexistent/qemu: No such file or directory (os error 2)");
}

#[tokio::test]
async fn a_hypervisor_that_is_something_else_is_told_in_its_own_words() {
    let Some(status) = refusal(|_, vm| vm.hypervisor_path = "/bin/ls".into()).await else { return };
    assert_eq!(status.code, Code::UNAVAILABLE);
    assert!(status.message.starts_with("QEMU did not start: /bin/ls (pid "), "{status}");
    assert!(status.message.contains("invalid option"), "{status}");
}

#[tokio::test]
async fn a_processor_feature_that_does_not_exist_is_told_in_qemus_words() {
    let change = |request: &mut CreateRequest, _: &mut VmConfig| {
        request.options = "accel = \"tcg\"\ncpu_features = \"warp=on\"".into();
    };
    let Some(status) = refusal(change).await else { return };
    assert_eq!(status.code, Code::UNAVAILABLE);
    assert!(status.message.contains("warp"), "{status}");
}

#[tokio::test]
async fn a_file_server_that_dies_is_told_in_its_own_words() {
    let change = |request: &mut CreateRequest, vm: &mut VmConfig| {
        let broken = std::path::Path::new(&request.run_dir).parent().unwrap().join("broken");
        fs::write(&broken, "#!/bin/sh\necho no user namespaces here >&2\nexit 4\n").unwrap();
        fs::set_permissions(&broken, PermissionsExt::from_mode(0o755)).unwrap();
        let fs = Fs { tag: "data".into(), shared_dir: "/tmp".into(), daemon_path: text(&broken), ..Default::default() };
        vm.devices.push(device("fs", Kind::Fs(fs)));
    };
    let Some(status) = refusal(change).await else { return };
    assert_eq!(status.code, Code::UNAVAILABLE);
    assert!(status.message.starts_with("the file server of share \"data\" ended: "), "{status}");
    assert!(status.message.ends_with("exited with status 4: no user namespaces here"), "{status}");
}

#[tokio::test]
async fn a_device_that_qemu_cannot_have_is_unimplemented() {
    let vfio = Kind::Vfio(vmm::Vfio { address: "0000:41:00.0".into(), ..Default::default() });
    let Some(status) = refusal(|_, vm| vm.devices.push(device("gpu", vfio))).await else { return };
    assert_eq!(status.code, Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn a_vm_is_not_booted_before_it_is_created() {
    let launcher = Launcher::start().await;
    let status = launcher.boot().await.unwrap_err();
    assert_eq!(status, Status::new(Code::FAILED_PRECONDITION, "cannot boot a VM that is not created"));
}

#[tokio::test]
async fn a_vm_is_created_and_booted_once() {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start().await;
    let request = launcher.request(&images, "sleep");
    launcher.create(&request).await.unwrap();
    let twice = launcher.create(&request).await.unwrap_err();
    assert_eq!(twice, Status::new(Code::FAILED_PRECONDITION, "cannot create a VM that is created but not booted"));
    launcher.boot().await.unwrap();
    let twice = launcher.boot().await.unwrap_err();
    assert_eq!(twice, Status::new(Code::FAILED_PRECONDITION, "cannot boot a VM that is running"));
}

#[tokio::test]
async fn what_qemu_is_not_made_to_do_is_unimplemented_and_no_capability() {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start().await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    let resize = vmm::ResizeMemoryRequest { memory_mib: 512, ..Default::default() };
    let status = Status::from(launcher.client.resize_memory(deadline(LIMIT), &resize).await.unwrap_err());
    assert_eq!(status, Status::new(Code::UNIMPLEMENTED, "changing the amount of memory is not supported with qemu"));
    let able = launcher.client.capabilities(deadline(LIMIT), &vmm::CapabilitiesRequest::new()).await.unwrap();
    assert_eq!(able.operations, ["pause"]);
    assert!(!able.accelerator_reason.is_empty());
}

#[tokio::test]
async fn a_program_that_is_not_qemu_has_no_capabilities() {
    let launcher = Launcher::start().await;
    let request = vmm::CapabilitiesRequest { hypervisor_path: "/bin/true".into(), ..Default::default() };
    let status = Status::from(launcher.client.capabilities(deadline(LIMIT), &request).await.unwrap_err());
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.starts_with("/bin/true is not QEMU"), "{status}");
}
