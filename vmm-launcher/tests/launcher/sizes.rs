//! Processors and memory that come and go while a VM runs.

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{self, CreateRequest, ResizeMemoryRequest, ResizeVcpusRequest},
};

use crate::{
    fixture::{Backend, Images, LIMIT, Launcher, for_backend},
    memory::{free_huge_pages, huge_kib},
};

for_backend!(
    qemu,
    Qemu,
    processors_come_and_go,
    memory_comes_and_goes,
    memory_that_comes_is_of_huge_pages_as_the_first_is,
    more_than_a_vm_was_made_for_is_refused,
    microvm_cannot_be_resized_and_says_so
);

for_backend!(
    cloud_hypervisor,
    CloudHypervisor,
    processors_come_and_go,
    memory_comes_and_goes,
    more_than_a_vm_was_made_for_is_refused
);
for_backend!(firecracker, Firecracker, memory_comes_and_goes, more_memory_than_a_vm_was_made_for_is_refused);

/// A guest that tells whenever its size changes.
async fn growing(backend: Backend, images: &Images, options: &str) -> Launcher {
    let launcher = Launcher::start(backend).await;
    let request = growing_request(&launcher, images, options);
    launcher.create(&request).await.unwrap();
    launcher
}

/// For such a guest.
fn growing_request(launcher: &Launcher, images: &Images, options: &str) -> CreateRequest {
    let mut request = launcher.request(images, "grow");
    request.options += options;
    let vm = request.vm.as_mut().unwrap();
    (vm.max_vcpus, vm.max_memory_mib) = (3, 512);
    vm.devices = vec![launcher.logged_console()];
    request
}

async fn resize_vcpus(launcher: &Launcher, vcpus: u32) -> Result<u32, Status> {
    let request = ResizeVcpusRequest { vcpus, ..Default::default() };
    launcher.client.resize_vcpus(deadline(LIMIT), &request).await.map(|done| done.vcpus).map_err(Status::from)
}

async fn resize_memory(launcher: &Launcher, memory_mib: u64) -> Result<u64, Status> {
    let request = ResizeMemoryRequest { memory_mib, ..Default::default() };
    launcher.client.resize_memory(deadline(LIMIT), &request).await.map(|done| done.memory_mib).map_err(Status::from)
}

/// Resizes it, until the guest says `sign`. A hypervisor that does not tell when the guest has come so far is asked once more.
async fn resize_memory_until(launcher: &Launcher, memory_mib: u64, sign: &str) {
    let has = resize_memory(launcher, memory_mib).await.unwrap();
    launcher.until_console_has(sign).await;
    if has != memory_mib {
        assert!(!launcher.backend.tells_of_memory(), "the guest has {has} MiB");
        assert_eq!(resize_memory(launcher, memory_mib).await, Ok(memory_mib));
    }
    let metrics = launcher.client.metrics(deadline(LIMIT), &vmm::MetricsRequest::new()).await.unwrap().text;
    assert!(metrics.contains(&format!("\ncaisson_vm_memory_bytes {}\n", memory_mib << 20)), "{metrics}");
}

async fn processors_come_and_go(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = growing(backend, &images, backend.growing()).await;
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: 1 processors").await;

    assert_eq!(resize_vcpus(&launcher, 3).await, Ok(3));
    launcher.until_console_has("guest: 3 processors").await;
    assert_eq!(resize_vcpus(&launcher, 2).await, Ok(2));
    launcher.until_console_has("guest: 2 processors").await;
    let metrics = launcher.client.metrics(deadline(LIMIT), &vmm::MetricsRequest::new()).await.unwrap().text;
    assert!(metrics.contains("\ncaisson_vm_vcpus 2\n"), "{metrics}");
}

async fn memory_comes_and_goes(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = growing(backend, &images, backend.growing()).await;
    launcher.boot().await.unwrap();
    launcher.until_console_has(" MiB").await;
    let told = launcher.heard();
    let usable = told.lines().find_map(|line| line.strip_prefix("guest: 1 processors, ")?.strip_suffix(" MiB"));
    let usable: u64 = usable.unwrap().parse().unwrap();

    resize_memory_until(&launcher, 448, &format!("guest: 1 processors, {} MiB", usable + 256)).await;
    // After one of its larger sizes: it may be seen halfway.
    resize_memory_until(&launcher, 192, &format!(" MiB\r\nguest: 1 processors, {usable} MiB")).await;
}

async fn memory_that_comes_is_of_huge_pages_as_the_first_is(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = growing_request(&launcher, &images, backend.growing());
    request.vm.as_mut().unwrap().huge_pages = true;
    let pid = match launcher.create(&request).await {
        Ok(created) => created.pid,
        Err(refusal) => return assert!(free_huge_pages() < 96, "{refusal}"),
    };
    launcher.boot().await.unwrap();
    launcher.until_console_has(" MiB").await;

    let before_kib = huge_kib(pid);
    assert_eq!(resize_memory(&launcher, 224).await, Ok(224));
    assert!(huge_kib(pid) >= before_kib + (32 << 10), "{before_kib}, then {} KiB of huge pages", huge_kib(pid));
}

async fn more_than_a_vm_was_made_for_is_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = growing(backend, &images, backend.growing()).await;
    let words = "4 vCPUs cannot be had while the VM runs: 1 to 3, which its max_vcpus says";
    assert_eq!(resize_vcpus(&launcher, 4).await, Err(Status::new(Code::INVALID_ARGUMENT, words)));
    more_memory_is_refused(&launcher).await;
}

async fn more_memory_than_a_vm_was_made_for_is_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = growing(backend, &images, "").await;
    more_memory_is_refused(&launcher).await;
}

async fn more_memory_is_refused(launcher: &Launcher) {
    let words = "513 MiB of memory cannot be had while the VM runs: 192 to 512, which its max_memory_mib says";
    assert_eq!(resize_memory(launcher, 513).await, Err(Status::new(Code::INVALID_ARGUMENT, words)));
}

async fn microvm_cannot_be_resized_and_says_so(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = growing(backend, &images, "").await;
    let able = launcher.client.capabilities(deadline(LIMIT), &vmm::CapabilitiesRequest::new()).await.unwrap();
    assert_eq!(able.operations, ["pause", "snapshot", "resize-balloon", "adopt"]);
    for refused in [resize_vcpus(&launcher, 2).await.map(u64::from), resize_memory(&launcher, 256).await] {
        let status = refused.unwrap_err();
        assert_eq!(status.code, Code::UNIMPLEMENTED);
        assert!(status.message.contains("machine_type = \"q35\" can be resized"), "{status}");
    }
    assert!(able.missing["resize-vcpus"].contains("q35") && able.missing["resize-memory"].contains("q35"));
}
