//! A device of the host that a guest gets to itself. The KVM test host has one to spare: a disk on PCI, behind an IOMMU.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{AttachRequest, DetachRequest, ExitReason, Vfio, device::Kind},
};
use caisson_testbed::skip;

use crate::{
    fixture::{Backend, Images, LIMIT, Launcher, device, for_backend},
    integrity,
};

for_backend!(
    qemu,
    Qemu,
    a_guest_has_a_device_of_the_host_to_itself,
    a_device_of_the_host_comes_and_goes,
    a_device_that_the_host_uses_is_not_taken_from_it
);
for_backend!(
    cloud_hypervisor,
    CloudHypervisor,
    a_guest_has_a_device_of_the_host_to_itself,
    a_device_of_the_host_comes_and_goes,
    a_device_that_the_host_uses_is_not_taken_from_it
);

/// Serial number of the disk, as the test host has it.
const SERIAL: &str = "spare";
/// How much of it is compared, in KiB.
const COMPARED_KIB: u64 = 512;

/// The disk, which belongs to the host again when this is dropped.
struct Spare {
    /// `0000:00:05.0`
    address: String,
    sysfs: PathBuf,
    /// As the host has read it.
    checksum: String,
}

impl Spare {
    /// None, with a word about it, where there is none.
    fn find() -> Option<Self> {
        let groups = fs::read_dir("/sys/kernel/iommu_groups").is_ok_and(|mut groups| groups.next().is_some());
        if !groups {
            skip("this machine has no IOMMU");
            return None;
        }
        let blocks = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
        let serial = |block: &Path| fs::read_to_string(block.join("serial")).unwrap_or_default();
        let Some(block) = blocks.into_iter().find(|block| serial(block).trim() == SERIAL) else {
            skip(format!("this machine has no disk called \"{SERIAL}\" to give away"));
            return None;
        };
        // …/0000:00:05.0/virtio3/block/vdb
        let sysfs = fs::canonicalize(&block).unwrap().ancestors().nth(3).unwrap().to_owned();
        let address = sysfs.file_name().unwrap().to_str().unwrap().to_owned();
        let disk = Path::new("/dev").join(block.file_name().unwrap());
        Some(Self { address, sysfs, checksum: checksum(&disk) })
    }

    /// Takes it from the host.
    fn give_away(&self) {
        self.bind("vfio-pci");
    }

    fn bind(&self, driver: &str) {
        fs::write(self.sysfs.join("driver_override"), driver).unwrap();
        fs::write(self.sysfs.join("driver/unbind"), &self.address).unwrap();
        fs::write("/sys/bus/pci/drivers_probe", &self.address).unwrap();
    }

    fn device(&self) -> Kind {
        Kind::Vfio(Vfio { address: self.address.clone(), ..Default::default() })
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.bind("virtio-pci");
    }
}

fn checksum(disk: &Path) -> String {
    let script = format!("head -c {COMPARED_KIB}K {} | md5sum", disk.display());
    String::from_utf8(Command::new("sh").args(["-c", &script]).output().unwrap().stdout).unwrap()
}

async fn a_guest_has_a_device_of_the_host_to_itself(backend: Backend) {
    let (Some(images), Some(spare)) = (Images::find(), Spare::find()) else { return };
    spare.give_away();
    let launcher = Launcher::start(backend).await;
    let script = format!("cat /sys/block/vda/serial\nhead -c {COMPARED_KIB}k /dev/vda | md5sum");
    let mut request = integrity::request(&launcher, &images, &script, &[("disk", spare.device())]);
    request.options += backend.growing();
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();

    let exit = launcher.wait().await;
    assert_eq!(exit.reason, ExitReason::GUEST_SHUTDOWN.into(), "{exit}");
    let console = exit.console_tail.replace('\r', "");
    assert!(console.contains(SERIAL) && console.contains(spare.checksum.trim()), "{} and {console}", spare.checksum);
}

async fn a_device_of_the_host_comes_and_goes(backend: Backend) {
    let (Some(images), Some(spare)) = (Images::find(), Spare::find()) else { return };
    spare.give_away();
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "watch");
    request.options += backend.growing();
    request.vm.as_mut().unwrap().devices = vec![launcher.logged_console()];
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: disks ").await;

    let attach = AttachRequest { device: Some(device("disk", spare.device())).into(), ..Default::default() };
    launcher.client.attach(deadline(LIMIT), &attach).await.unwrap();
    launcher.until_console_has(&format!("guest: disks {SERIAL}")).await;

    let detach = DetachRequest { id: "disk".into(), ..Default::default() };
    launcher.client.detach(deadline(LIMIT), &detach).await.unwrap();
    launcher.until_console_has(&format!("guest: disks {SERIAL}\r\nguest: disks ")).await;
}

async fn a_device_that_the_host_uses_is_not_taken_from_it(backend: Backend) {
    let (Some(images), Some(spare)) = (Images::find(), Spare::find()) else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.options += backend.growing();
    request.vm.as_mut().unwrap().devices = vec![device("disk", spare.device())];
    let status = launcher.create(&request).await.unwrap_err();
    let why = format!("PCI device {} is used by the driver virtio-pci; bind it to vfio-pci", spare.address);
    assert_eq!(status, Status::new(Code::INVALID_ARGUMENT, why));
    assert!(launcher.leftovers().is_empty());
}
