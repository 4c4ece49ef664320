//! A VM that is written to a directory, and goes on as another.

use std::{fs, time::Duration};

use caisson_protocol::{
    deadline,
    vmm::{Console, PauseRequest, RestoreRequest, ResumeRequest, SnapshotRequest, VmState, device::Kind},
};

use crate::fixture::{Backend, Images, LIMIT, Launcher, device, for_backend, text};

for_backend!(cloud_hypervisor, CloudHypervisor, a_restored_guest_goes_on_where_it_was);
for_backend!(firecracker, Firecracker, a_restored_guest_goes_on_where_it_was);

async fn a_restored_guest_goes_on_where_it_was(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let snapshot = images.dir.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    let first = Launcher::start(backend).await;
    let mut request = first.request(&images, "tick");
    let log = first.dir.path().join("console.log");
    request.vm.as_mut().unwrap().devices =
        vec![device("console", Kind::Console(Console { log: text(&log), ..Default::default() }))];
    first.create(&request).await.unwrap();
    first.boot().await.unwrap();
    first.until_console_has(&log, "guest: tick").await;
    first.client.pause(deadline(LIMIT), &PauseRequest::new()).await.unwrap();
    let directory = SnapshotRequest { directory: text(&snapshot), ..Default::default() };
    first.client.snapshot(deadline(LIMIT), &directory).await.unwrap();
    first.stop(Duration::ZERO).await;

    let second = Launcher::start(backend).await;
    let log = second.dir.path().join("console.log");
    let mut vm = request.vm.unwrap();
    vm.devices = vec![device("console", Kind::Console(Console { log: text(&log), ..Default::default() }))];
    let restore = RestoreRequest {
        run_dir: text(&second.run_dir()),
        directory: text(&snapshot),
        vm: Some(vm).into(),
        options: request.options,
        ..Default::default()
    };
    second.client.restore(deadline(LIMIT), &restore).await.unwrap();
    assert_eq!(second.state().await.state, VmState::PAUSED.into());
    second.client.resume(deadline(LIMIT), &ResumeRequest::new()).await.unwrap();

    second.until_console_has(&log, "guest: tick").await;
    assert!(!fs::read_to_string(log).unwrap().contains("guest: up"));
}
