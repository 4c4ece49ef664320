//! A VM as Cloud Hypervisor's `VmConfig`, and what of the host Cloud Hypervisor gets to see.

use std::{os::fd::OwnedFd, path::Path};

use caisson_protocol::{
    address::HYBRID_CID,
    vmm::{Device, GuestDevice, VmConfig, device::Kind},
};
use caisson_vmm_launcher::{Error, Result, huge_pages::SIZE_MIB, jail::Jail, request, tap, vfio};
use serde_json::{Value, json};

use crate::{
    layout::{self, FILLED_LATER, IMAGE, INITRD, KERNEL, SERIAL, VSOCK},
    options::Options,
};

/// For every guest: the console is the serial port and there is no other to look for, a panic ends the VM at once, only a
/// panic and what the agent says is worth a slow serial port.
const ALWAYS: &str = "console=ttyS0 quiet panic=-1 random.trust_cpu=on 8250.nr_uarts=1 cryptomgr.notests";
/// Memory that is added while the guest runs is used at once, and can be taken away again.
const ONLINE: &str = "memhp_default_state=online_movable";
/// What memory that is added later is a multiple of: `VIRTIO_MEM_ALIGN_SIZE`.
const MEMORY_BLOCK_MIB: u64 = 128;
/// `DEFAULT_FS_QUEUE_SIZE`.
const FS_QUEUE_SIZE: u32 = 1024;

/// What `vm.create` is told.
#[derive(Debug)]
pub struct Configuration {
    pub body: Value,
    /// In the request's order.
    pub devices: Vec<GuestDevice>,
}

impl Configuration {
    /// Everything that `vm` has; `run_dir` is where its sockets are on the host.
    ///
    /// # Errors
    /// When Cloud Hypervisor has no such device.
    pub fn of(vm: &VmConfig, options: &Options, landlock: bool, run_dir: &Path) -> Result<Self> {
        let mut body = json!({
            "cpus": { "boot_vcpus": vm.vcpus, "max_vcpus": vm.max_vcpus.max(vm.vcpus) },
            "memory": { "size": vm.memory_mib << 20, "shared": options.shared_memory || has(vm, "fs") },
            "payload": { "kernel": KERNEL, "cmdline": kernel_params(vm) },
            // Unless it is off, it takes the launcher's standard streams.
            "console": { "mode": "Off" },
            "serial": { "mode": "Socket", "socket": layout::in_run(SERIAL) },
            "landlock_enable": landlock,
        });
        if vm.huge_pages {
            body["memory"]["hugepages"] = true.into();
            body["memory"]["hugepage_size"] = (SIZE_MIB << 20).into();
        }
        if vm.max_memory_mib > vm.memory_mib {
            body["memory"]["hotplug_method"] = "VirtioMem".into();
            let more_mib = (vm.max_memory_mib - vm.memory_mib).next_multiple_of(MEMORY_BLOCK_MIB);
            body["memory"]["hotplug_size"] = (more_mib << 20).into();
        }
        if !vm.initrd.is_empty() {
            body["payload"]["initramfs"] = INITRD.into();
        }
        if landlock {
            let allowed = FILLED_LATER.iter().chain(&[layout::RUN]);
            body["landlock_rules"] = allowed.map(|path| json!({ "path": path, "access": "rw" })).collect();
        }
        if !vm.image.is_empty() {
            push(&mut body, "disks", disk("image", IMAGE, true));
        }
        let mut devices = Vec::with_capacity(vm.devices.len());
        for device in &vm.devices {
            add(&mut body, device)?;
            let address = address(device, run_dir)?;
            devices.push(GuestDevice { id: device.id.clone(), address, ..Default::default() });
        }
        Ok(Self { body, devices })
    }
}

/// A device that can come while the guest runs, as `vm.create` and `vm.add-…` take it: the list that it is in, and itself.
///
/// # Errors
/// When it is something else.
pub fn hotpluggable(device: &Device) -> Result<(&'static str, Value)> {
    let id = device.id.as_str();
    match request::kind(device)? {
        Kind::Block(block) => Ok(("disks", disk(id, &layout::disk(id), block.read_only))),
        Kind::Pmem(pmem) => {
            Ok(("pmem", json!({ "id": id, "file": layout::disk(id), "discard_writes": pmem.read_only })))
        }
        Kind::Net(net) => {
            let queues = 2 * net.queue_pairs.max(1);
            Ok(("net", json!({ "id": id, "mac": net.mac, "num_queues": queues })))
        }
        Kind::Fs(fs) => {
            let socket = layout::in_run(&layout::fs_socket(id));
            let queue = FS_QUEUE_SIZE;
            Ok(("fs", json!({ "id": id, "tag": fs.tag, "socket": socket, "num_queues": 1, "queue_size": queue })))
        }
        Kind::Vfio(vfio) => Ok(("devices", json!({ "id": id, "path": layout::host_device(&vfio.address) }))),
        other => {
            let kind = request::kind_name(other);
            Err(Error::Unsupported(format!("attaching a {kind} device is not supported with cloud-hypervisor")))
        }
    }
}

/// Whether a device that the VM is born with is added after `vm.create`: a network card with its taps, which come along with
/// a request of their own, and a device of the host, because Landlock's rules for it would be those for another path.
pub fn comes_before_the_boot(device: &Device) -> bool {
    matches!(device.kind, Some(Kind::Net(_) | Kind::Vfio(_)))
}

/// The open taps that `device` needs, if it is a network card.
///
/// # Errors
/// When they cannot be opened.
pub fn taps(device: &Device) -> Result<Vec<OwnedFd>> {
    match &device.kind {
        Some(Kind::Net(net)) => tap::open(net),
        _ => Ok(Vec::new()),
    }
}

/// Where the guest finds `device`.
///
/// # Errors
/// When it has no kind.
pub fn address(device: &Device, run_dir: &Path) -> Result<String> {
    Ok(match request::kind(device)? {
        Kind::Block(_) => format!("serial:{}", device.id),
        Kind::Fs(fs) => format!("tag:{}", fs.tag),
        // Not where the request has it, but in the one directory of the host that Cloud Hypervisor can write to.
        Kind::Vsock(_) => format!("hvsock:{}", run_dir.join(VSOCK).display()),
        _ => String::new(),
    })
}

/// Shows `vm`'s own files to Cloud Hypervisor.
pub fn show(vm: &VmConfig, run_dir: &Path, jail: &mut Jail) {
    jail.show(run_dir, layout::RUN, true);
    FILLED_LATER.iter().for_each(|directory| jail.make_directory(*directory));
    for device in ["/dev/kvm", "/dev/urandom", vfio::CONTAINER] {
        if Path::new(device).exists() {
            jail.show(device, device, true);
        }
    }
    for (path, inside) in [(&vm.kernel, KERNEL), (&vm.initrd, INITRD), (&vm.image, IMAGE)] {
        if !path.is_empty() {
            jail.show(path, inside, false);
        }
    }
    for device in &vm.devices {
        match &device.kind {
            Some(Kind::Block(block)) => jail.show(&block.path, layout::disk(&device.id), !block.read_only),
            Some(Kind::Pmem(pmem)) => jail.show(&pmem.path, layout::disk(&device.id), !pmem.read_only),
            Some(Kind::Rng(rng)) if rng.source != "/dev/urandom" => jail.show(&rng.source, &rng.source, false),
            _ => {}
        }
    }
}

fn add(body: &mut Value, device: &Device) -> Result<()> {
    match request::kind(device)? {
        Kind::Vsock(_) => {
            let socket = layout::in_run(VSOCK);
            body["vsock"] = json!({ "id": device.id, "cid": HYBRID_CID, "socket": socket });
        }
        Kind::Balloon(balloon) => {
            let reporting = balloon.free_page_reporting;
            body["balloon"] = json!({ "size": 0, "deflate_on_oom": true, "free_page_reporting": reporting });
        }
        Kind::Rng(rng) => body["rng"] = json!({ "src": rng.source }),
        // The serial port, which every guest has.
        Kind::Console(_) => {}
        _ if comes_before_the_boot(device) => {}
        _ => {
            let (list, device) = hotpluggable(device)?;
            push(body, list, device);
        }
    }
    Ok(())
}

fn push(body: &mut Value, list: &str, device: Value) {
    match &mut body[list] {
        Value::Array(devices) => devices.push(device),
        none => *none = json!([device]),
    }
}

fn disk(id: &str, path: &str, read_only: bool) -> Value {
    // Of an image without a type it would look for one, and keep the guest from writing its first sector.
    json!({ "id": id, "path": path, "readonly": read_only, "serial": id, "image_type": "Raw" })
}

fn has(vm: &VmConfig, kind: &str) -> bool {
    vm.devices.iter().filter_map(|device| device.kind.as_ref()).any(|found| request::kind_name(found) == kind)
}

/// The guest kernel's command line; what `vm` asks for comes last and wins.
fn kernel_params(vm: &VmConfig) -> String {
    let mut params = vec![ALWAYS];
    if vm.max_memory_mib > vm.memory_mib {
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
    use caisson_protocol::vmm::{Balloon, Block, Fs, Net, Vfio, Vsock};

    use super::*;

    fn with(kinds: Vec<(&str, Kind)>) -> VmConfig {
        let device = |(id, kind): (&str, Kind)| Device { id: id.into(), kind: Some(kind), ..Default::default() };
        let devices = kinds.into_iter().map(device).collect();
        VmConfig { vcpus: 1, memory_mib: 256, devices, ..Default::default() }
    }

    fn of(vm: &VmConfig) -> Result<Configuration> {
        Configuration::of(vm, &Options::default(), true, Path::new("/run/vm"))
    }

    #[test]
    fn devices_are_where_the_guest_is_told() {
        let configuration = of(&with(vec![
            ("root", Kind::Block(Block { path: "/r".into(), read_only: true, ..Default::default() })),
            ("net", Kind::Net(Net { tap: "tap0".into(), queue_pairs: 2, ..Default::default() })),
            ("vsock", Kind::Vsock(Vsock { socket: "/s".into(), ..Default::default() })),
            ("fs", Kind::Fs(Fs { tag: "share".into(), ..Default::default() })),
            ("balloon", Kind::Balloon(Balloon::default())),
        ]))
        .unwrap();
        assert_eq!(configuration.body["disks"][0]["image_type"], "Raw");
        assert_eq!(configuration.body["fs"][0]["socket"], "/run/fs-fs.sock");
        let addresses: Vec<_> = configuration.devices.iter().map(|device| device.address.as_str()).collect();
        assert_eq!(addresses, ["serial:root", "", "hvsock:/run/vm/vsock.sock", "tag:share", ""]);
    }

    #[test]
    fn the_launchers_standard_streams_stay_its_own() {
        let body = of(&with(Vec::new())).unwrap().body;
        assert_eq!(body["console"]["mode"], "Off");
        assert_eq!(body["serial"]["mode"], "Socket");
        assert_eq!(body["memory"]["shared"], false);
    }

    #[test]
    fn what_comes_later_is_already_within_landlocks_rules() {
        let body = of(&with(Vec::new())).unwrap().body;
        assert_eq!(body["landlock_enable"], true);
        assert_eq!(body["landlock_rules"][0], json!({ "path": "/disks", "access": "rw" }));
    }

    #[test]
    fn more_memory_can_come_as_virtio_mem() {
        let vm = VmConfig { max_memory_mib: 500, ..with(Vec::new()) };
        let body = of(&vm).unwrap().body;
        assert_eq!(body["memory"]["hotplug_method"], "VirtioMem");
        assert_eq!(body["memory"]["hotplug_size"], 256 << 20);
        assert!(body["payload"]["cmdline"].as_str().unwrap().ends_with(ONLINE));
    }

    #[test]
    fn memory_can_be_of_huge_pages() {
        let body = of(&VmConfig { huge_pages: true, ..with(Vec::new()) }).unwrap().body;
        assert_eq!((&body["memory"]["hugepages"], &body["memory"]["hugepage_size"]), (&json!(true), &json!(2 << 20)));
        assert_eq!(of(&with(Vec::new())).unwrap().body["memory"]["hugepages"], Value::Null);
    }

    #[test]
    fn a_card_comes_with_its_taps_and_has_a_queue_each_way_on_each() {
        let vm = with(vec![("net", Kind::Net(Net { tap: "tap0".into(), queue_pairs: 2, ..Default::default() }))]);
        assert_eq!(of(&vm).unwrap().body["net"], Value::Null);
        assert!(comes_before_the_boot(&vm.devices[0]));
        let (list, body) = hotpluggable(&vm.devices[0]).unwrap();
        assert_eq!((list, &body["num_queues"], &body["tap"]), ("net", &json!(4), &Value::Null));
    }

    #[test]
    fn a_device_of_the_host_comes_after_landlocks_rules() {
        let vm = with(vec![("gpu", Kind::Vfio(Vfio { address: "0000:41:00.0".into(), ..Default::default() }))]);
        assert_eq!(of(&vm).unwrap().body["devices"], Value::Null);
        let (list, body) = hotpluggable(&vm.devices[0]).unwrap();
        assert_eq!((list, body["path"].as_str()), ("devices", Some("/sys/bus/pci/devices/0000:41:00.0")));
    }
}
