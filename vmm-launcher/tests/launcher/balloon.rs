//! Memory that a guest gives up: because it is asked to, and because it does not use it.

use std::{fs, time::Duration};

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{self, Balloon, ResizeBalloonRequest, device::Kind},
};
use tokio::time::timeout;

use crate::{
    fixture::{Backend, Images, LIMIT, Launcher, device, for_each_backend},
    integrity,
};

for_each_backend!(
    a_balloon_takes_memory_and_gives_it_back,
    a_balloon_that_is_as_large_as_the_guest_is_refused,
    what_a_guest_does_not_use_any_more_is_the_hosts_again,
);

async fn resize(launcher: &Launcher, memory_mib: u64) -> Result<u64, Status> {
    let timeout_ms = LIMIT.as_millis() as u32;
    let request = ResizeBalloonRequest { memory_mib, timeout_ms, ..Default::default() };
    let answer = launcher.client.resize_balloon(deadline(2 * LIMIT), &request).await;
    answer.map(|done| done.memory_mib).map_err(Status::from)
}

/// Resizes it, and goes on asking a hypervisor that does not tell when the guest has come so far.
async fn resize_fully(launcher: &Launcher, memory_mib: u64) {
    let tells = launcher.backend.tells_of_memory();
    let resized = async {
        loop {
            match resize(launcher, memory_mib).await.unwrap() {
                held if held == memory_mib => return,
                held => assert!(!tells, "the balloon holds {held} MiB"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    timeout(LIMIT, resized).await.expect("the guest gives what it is asked for");
}

async fn metric(launcher: &Launcher, name: &str) -> u64 {
    let metrics = launcher.client.metrics(deadline(LIMIT), &vmm::MetricsRequest::new()).await.unwrap().text;
    let start = format!("caisson_vm_balloon_{name}{{device=\"balloon\"}} ");
    let value = metrics.lines().find_map(|line| line.strip_prefix(&start));
    value.unwrap_or_else(|| panic!("{metrics}")).parse().unwrap()
}

fn devices(launcher: &Launcher, free_page_reporting: bool) -> Vec<vmm::Device> {
    vec![
        launcher.logged_console(),
        device("balloon", Kind::Balloon(Balloon { free_page_reporting, ..Default::default() })),
    ]
}

async fn a_balloon_takes_memory_and_gives_it_back(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.vm.as_mut().unwrap().devices = devices(&launcher, false);
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: up").await;

    resize_fully(&launcher, 64).await;
    if backend == Backend::Builtin {
        assert_eq!(metric(&launcher, "actual_bytes").await, 64 << 20);
        assert!(metric(&launcher, "inflated_bytes_total").await >= 64 << 20);
    }
    resize_fully(&launcher, 16).await;
    resize_fully(&launcher, 0).await;
    if backend == Backend::Builtin {
        assert!(metric(&launcher, "deflated_bytes_total").await >= 64 << 20);
    }
}

async fn a_balloon_that_is_as_large_as_the_guest_is_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    launcher.create(&launcher.request(&images, "sleep")).await.unwrap();
    let refused = |message: &str| Err(Status::new(Code::INVALID_ARGUMENT, message));
    assert_eq!(resize(&launcher, 192).await, refused("a balloon cannot hold 192 MiB of a guest's 192 MiB"));
    assert_eq!(resize(&launcher, 64).await, refused("the VM has no balloon device"));
}

async fn what_a_guest_does_not_use_any_more_is_the_hosts_again(backend: Backend) {
    const USED_KIB: u64 = 96 << 10;
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let script = "mount -t tmpfs files /mnt\n\
                  dd if=/dev/zero of=/mnt/file bs=1M count=96\n\
                  rm /mnt/file\n\
                  echo guest: needs it no more\n\
                  sleep 1000";
    let mut request = integrity::request(&launcher, &images, script, &[]);
    request.vm.as_mut().unwrap().devices = devices(&launcher, true);
    let pid = launcher.create(&request).await.unwrap().pid;
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: needs it no more").await;

    let most = resident_kib(pid, "VmHWM:");
    assert!(most > USED_KIB, "{most} KiB");
    // The guest's kernel takes its time to report, and tells nobody but its device.
    let freed = async {
        while resident_kib(pid, "VmRSS:") + USED_KIB / 2 > most {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    timeout(LIMIT, freed).await.expect("the memory comes back");
    if backend == Backend::Builtin {
        assert!(metric(&launcher, "reported_bytes_total").await > (USED_KIB << 10) / 2);
    }
}

/// Of process `pid`: the line `name` of proc_pid_status(5).
fn resident_kib(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
}
