//! What Firecracker is told before it starts the guest, and what of the host it gets to see.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use caisson_protocol::{
    address::HYBRID_CID,
    vmm::{Block, Device, GuestDevice, VmConfig, device::Kind},
};
use caisson_vmm_launcher::{Error, Result, jail::Jail, request};
use serde_json::{Value, json};

use crate::{
    disks::{self, ROOT, Spare},
    layout::{self, IMAGE, INITRD, KERNEL, VSOCK},
    options::Options,
};

/// For every guest: the console is the serial port and there is no other to look for, a panic and the end of the guest
/// reset it by the keyboard controller, which is Firecracker's way to end (it has no power switch), only a panic and what
/// the agent says is worth a slow serial port.
const ALWAYS: &str = "console=ttyS0 quiet panic=-1 reboot=k caisson.end=reboot random.trust_cpu=on 8250.nr_uarts=1 \
                      cryptomgr.notests i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";
/// Memory that is added while the guest runs is used at once, and can be taken away again.
const ONLINE: &str = "memhp_default_state=online_movable";
/// What memory is added by, in MiB.
pub const MEMORY_SLOT_MIB: u64 = 128;
/// In seconds: with statistics Firecracker says what a balloon holds, whenever it is asked. The guest's own, which come at
/// this interval, are of no use here: the longest is 18 hours.
const BALLOON_STATISTICS_S: u16 = u16::MAX;
/// Firecracker asks the kernel for random numbers.
const ENTROPY: [&str; 2] = ["/dev/urandom", "/dev/random"];

/// A VM as calls of Firecracker's API.
#[derive(Debug, Default)]
pub struct Configuration {
    /// `PUT path body`, in this order.
    pub calls: Vec<(String, Value)>,
    /// In the request's order.
    pub devices: Vec<GuestDevice>,
    pub spares: Vec<Spare>,
}

impl Configuration {
    /// Everything that `vm` has; `run_dir` is where its sockets are on the host.
    ///
    /// # Errors
    /// When Firecracker has no such device.
    pub fn of(vm: &VmConfig, options: &Options, run_dir: &Path) -> Result<Self> {
        let mut configuration = Self::default();
        let mut machine = json!({ "vcpu_count": vm.vcpus, "mem_size_mib": vm.memory_mib });
        // Unknown before 1.7.
        if vm.huge_pages {
            machine["huge_pages"] = "2M".into();
        }
        configuration.call("/machine-config", machine);
        if let Some(more) = memory_to_add(vm) {
            configuration.call("/hotplug/memory", json!({ "total_size_mib": more, "slot_size_mib": MEMORY_SLOT_MIB }));
        }
        let mut boot = json!({ "kernel_image_path": KERNEL, "boot_args": kernel_params(vm, options) });
        if !vm.initrd.is_empty() {
            boot["initrd_path"] = INITRD.into();
        }
        configuration.call("/boot-source", boot);
        if !vm.image.is_empty() {
            configuration.drive(ROOT, IMAGE, true);
        }
        for device in &vm.devices {
            let address = configuration.device(device, run_dir)?;
            configuration.devices.push(GuestDevice { id: device.id.clone(), address, ..Default::default() });
        }
        configuration.spares = disks::spares(options, places(vm), vm.spare_disks as usize)?;
        for spare in configuration.spares.clone() {
            configuration.drive(&spare.id, &layout::in_run(layout::EMPTY), !spare.writable);
        }
        Ok(configuration)
    }

    fn device(&mut self, device: &Device, run_dir: &Path) -> Result<String> {
        let id = device.id.as_str();
        match request::kind(device)? {
            Kind::Block(_) if disks::is_reserved(&iface(id)) => {
                return Err(Error::Invalid(format!(
                    "a disk cannot be called \"{id}\": Firecracker's root disk and spare disks are called so"
                )));
            }
            Kind::Block(block) => {
                self.drive(id, &layout::disk(id), block.read_only);
                return serial(block);
            }
            Kind::Net(net) => {
                if net.queue_pairs > 1 {
                    return Err(Error::Unsupported(format!(
                        "network device \"{id}\" cannot have {} queue pairs: Firecracker's have one",
                        net.queue_pairs
                    )));
                }
                let body = json!({ "iface_id": iface(id), "host_dev_name": net.tap, "guest_mac": net.mac });
                self.call(&format!("/network-interfaces/{}", iface(id)), body);
            }
            Kind::Vsock(_) => {
                // Not where the request has it, but in the one directory of the host that Firecracker can write to.
                self.call("/vsock", json!({ "guest_cid": HYBRID_CID, "uds_path": layout::in_run(VSOCK) }));
                return Ok(format!("hvsock:{}", run_dir.join(VSOCK).display()));
            }
            Kind::Pmem(pmem) => {
                let body = json!({ "id": iface(id), "path_on_host": layout::disk(id), "read_only": pmem.read_only });
                self.call(&format!("/pmem/{}", iface(id)), body);
            }
            Kind::Balloon(balloon) => {
                let mut body = json!({
                    "amount_mib": 0,
                    "deflate_on_oom": true,
                    "stats_polling_interval_s": BALLOON_STATISTICS_S,
                });
                // Unknown before 1.14.
                if balloon.free_page_reporting {
                    body["free_page_reporting"] = true.into();
                }
                self.call("/balloon", body);
            }
            Kind::Rng(rng) if ENTROPY.contains(&rng.source.as_str()) => self.call("/entropy", json!({})),
            Kind::Rng(rng) => {
                return Err(Error::Unsupported(format!(
                    "{} cannot be the source of entropy: Firecracker's is {}",
                    rng.source, ENTROPY[0]
                )));
            }
            // The serial port, which every guest has.
            Kind::Console(_) => {}
            other => {
                let kind = request::kind_name(other);
                return Err(Error::Unsupported(format!("Firecracker has no {kind} device")));
            }
        }
        Ok(String::new())
    }

    fn drive(&mut self, id: &str, path: &str, read_only: bool) {
        let id = iface(id);
        let body = json!({ "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": read_only });
        self.call(&format!("/drives/{id}"), body);
    }

    fn call(&mut self, path: &str, body: Value) {
        self.calls.push((path.to_owned(), body));
    }
}

/// A device's id as Firecracker takes it, letters, digits and `_`.
pub fn iface(id: &str) -> String {
    id.replace('-', "_")
}

/// Shows `vm`'s own files to Firecracker.
pub fn show(vm: &VmConfig, run_dir: &Path, jail: &mut Jail) {
    jail.show(run_dir, layout::RUN, true);
    jail.show("/dev/kvm", "/dev/kvm", true);
    jail.show(&vm.kernel, KERNEL, false);
    for (path, inside) in [(&vm.initrd, INITRD), (&vm.image, IMAGE)] {
        if !path.is_empty() {
            jail.show(path, inside, false);
        }
    }
    let has_net = vm.devices.iter().any(|device| matches!(device.kind, Some(Kind::Net(_))));
    if has_net {
        jail.show("/dev/net/tun", "/dev/net/tun", true);
    }
    for device in &vm.devices {
        match &device.kind {
            Some(Kind::Block(block)) => jail.show(&block.path, layout::disk(&device.id), !block.read_only),
            Some(Kind::Pmem(pmem)) => jail.show(&pmem.path, layout::disk(&device.id), !pmem.read_only),
            _ => {}
        }
    }
}

/// The serial number that the guest reads from a disk. Firecracker makes it from the file, `build_device_id` in its
/// block device.
///
/// # Errors
/// When the file is gone.
pub fn serial(block: &Block) -> Result<String> {
    let file = fs::metadata(&block.path).map_err(Error::host(format!("look at {}", block.path)))?;
    let mut number = format!("{}{}{}", file.dev(), file.rdev(), file.ino());
    // VIRTIO_BLK_ID_BYTES, virtio 1.2 §5.2.6.
    number.truncate(20);
    Ok(format!("serial:{number}"))
}

/// How much memory, in MiB, can be added while the guest runs.
pub fn memory_to_add(vm: &VmConfig) -> Option<u64> {
    let more = vm.max_memory_mib.saturating_sub(vm.memory_mib).next_multiple_of(MEMORY_SLOT_MIB);
    (more > 0).then_some(more)
}

/// How many places on its bus `vm` needs for what it is born with.
fn places(vm: &VmConfig) -> usize {
    let devices = vm.devices.iter().filter(|device| !matches!(device.kind, Some(Kind::Console(_))));
    devices.count() + usize::from(!vm.image.is_empty()) + usize::from(memory_to_add(vm).is_some())
}

/// The guest kernel's command line; what `vm` asks for comes last and wins.
fn kernel_params(vm: &VmConfig, options: &Options) -> String {
    let mut params = vec![ALWAYS];
    if !options.pci {
        params.push("pci=off");
    }
    if memory_to_add(vm).is_some() {
        params.push(ONLINE);
    }
    if !vm.image.is_empty() {
        params.push("root=/dev/vda ro");
    }
    params.push(&vm.kernel_params);
    params.join(" ").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use caisson_protocol::vmm::{Fs, Rng, Vsock};

    use super::*;

    fn with(kinds: Vec<(&str, Kind)>) -> VmConfig {
        let device = |(id, kind): (&str, Kind)| Device { id: id.into(), kind: Some(kind), ..Default::default() };
        let devices = kinds.into_iter().map(device).collect();
        VmConfig { vcpus: 1, memory_mib: 256, initrd: "/initrd".into(), devices, ..Default::default() }
    }

    fn of(vm: &VmConfig) -> Result<Configuration> {
        Configuration::of(vm, &Options::default(), Path::new("/run/vm"))
    }

    #[test]
    fn memory_can_be_of_huge_pages() {
        let calls = of(&VmConfig { huge_pages: true, ..with(Vec::new()) }).unwrap().calls;
        assert_eq!(calls[0].1, json!({ "vcpu_count": 1, "mem_size_mib": 256, "huge_pages": "2M" }));
    }

    #[test]
    fn the_guest_is_reached_in_the_run_directory() {
        let vsock = Kind::Vsock(Vsock { socket: "/s".into(), ..Default::default() });
        assert_eq!(of(&with(vec![("vsock", vsock)])).unwrap().devices[0].address, "hvsock:/run/vm/vsock.sock");
    }

    #[test]
    fn the_image_is_the_first_disk_and_the_root() {
        let vm = VmConfig { image: "/image".into(), kernel_params: "quiet".into(), ..with(Vec::new()) };
        assert!(kernel_params(&vm, &Options::default()).ends_with(" pci=off root=/dev/vda ro quiet"));
        let calls = of(&vm).unwrap().calls;
        assert_eq!(calls.iter().find(|(path, _)| path.starts_with("/drives/")).unwrap().0, "/drives/image");
    }

    #[test]
    fn a_disk_does_not_take_the_place_of_another() {
        for id in ["image", "spare-ro-0"] {
            let refusal = of(&with(vec![(id, Kind::Block(Block::default()))])).unwrap_err().to_string();
            assert!(refusal.starts_with(&format!("a disk cannot be called \"{id}\": ")), "{refusal}");
        }
    }

    #[test]
    fn a_pod_of_one_container_has_no_spare_disks() {
        let drives = |spare_disks| {
            let vm = VmConfig { spare_disks, ..with(Vec::new()) };
            of(&vm).unwrap().calls.iter().filter(|(path, _)| path.starts_with("/drives/spare_")).count()
        };
        assert_eq!((drives(0), drives(10)), (0, 10));
    }

    #[test]
    fn every_device_but_the_console_needs_a_place() {
        let vsock = || Kind::Vsock(Vsock { socket: "/s".into(), ..Default::default() });
        let console = Kind::Console(caisson_protocol::vmm::Console::default());
        let vm = with(vec![("vsock", vsock()), ("console", console)]);
        assert_eq!(places(&vm), 1);
        assert_eq!(places(&VmConfig { max_memory_mib: 512, image: "/image".into(), ..vm }), 3);
    }

    #[test]
    fn a_shared_directory_is_unsupported() {
        let refusal = of(&with(vec![("fs", Kind::Fs(Fs::default()))])).unwrap_err();
        assert!(matches!(refusal, Error::Unsupported(why) if why == "Firecracker has no fs device"));
    }

    #[test]
    fn another_source_of_entropy_is_unsupported() {
        let refusal = of(&with(vec![("rng", Kind::Rng(Rng { source: "/dev/hwrng".into(), ..Default::default() }))]));
        assert!(refusal.unwrap_err().to_string().starts_with("/dev/hwrng cannot be the source of entropy"));
    }

    #[test]
    fn memory_is_added_in_whole_slots() {
        let vm = VmConfig { memory_mib: 256, max_memory_mib: 300, ..Default::default() };
        assert_eq!(memory_to_add(&vm), Some(128));
        assert_eq!(memory_to_add(&VmConfig { memory_mib: 256, ..Default::default() }), None);
    }
}
