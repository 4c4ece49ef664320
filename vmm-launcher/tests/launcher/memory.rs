//! Memory of huge pages, where the host has some, and that nothing else is called that.

use std::fs;

use caisson_protocol::{status::Code, vmm::ExitReason};

use crate::fixture::{Backend, Images, Launcher, for_each_backend};

for_each_backend!(memory_is_of_huge_pages_or_refused, a_confidential_guest_is_refused);

async fn memory_is_of_huge_pages_or_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "tick");
    let vm = request.vm.as_mut().unwrap();
    // Rounded up to whole pages.
    (vm.huge_pages, vm.memory_mib) = (true, 193);
    vm.devices = vec![launcher.logged_console()];
    let pid = match launcher.create(&request).await {
        Ok(created) => created.pid,
        Err(refusal) if backend == Backend::StratoVirt => {
            let words = "stratovirt guests get no huge pages: the launcher asks for none";
            assert_eq!((refusal.code, refusal.message.as_str()), (Code::UNIMPLEMENTED, words));
            return;
        }
        Err(refusal) => {
            assert!(free_huge_pages() < 97, "{refusal}");
            let words = "194 MiB of memory take 97 huge pages of 2 MiB, and this machine has ";
            assert!(refusal.message.starts_with(words), "{refusal}");
            return;
        }
    };
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: tick").await;
    assert!(huge_kib(pid) > 16 << 10, "{} KiB of huge pages", huge_kib(pid));
    launcher.stop(std::time::Duration::ZERO).await;
    assert_eq!(launcher.wait().await.reason, ExitReason::STOPPED.into());
}

async fn a_confidential_guest_is_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "poweroff");
    request.vm.as_mut().unwrap().confidential_guest = true;
    let refusal = launcher.create(&request).await.unwrap_err();
    let words = format!("confidential guests are not supported with {}", backend.name());
    assert_eq!((refusal.code, refusal.message), (Code::UNIMPLEMENTED, words));
}

/// Reserved and not taken, or to be had beyond the reserve.
pub fn free_huge_pages() -> u64 {
    let number = |name| -> u64 {
        let file = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        fs::read_to_string(file).unwrap_or_default().trim().parse().unwrap_or_default()
    };
    number("free_hugepages") + number("nr_overcommit_hugepages")
}

/// Of process `pid`.
pub fn huge_kib(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let lines = rollup.lines().filter(|line| line.contains("_Hugetlb:"));
    lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}
