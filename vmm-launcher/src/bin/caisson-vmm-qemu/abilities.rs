//! What QEMU can do, for `Capabilities`: by the machine that it makes, and by the devices that it was built with.

use caisson_protocol::vmm::CapabilitiesResponse;
use caisson_vmm_launcher::{
    ability::{
        Ability::{Device, Hotplug, Operation},
        never,
    },
    vfio,
};

use crate::{options::MachineType, probe::Installed};

const BALLOON: &str = "virtio-balloon";

/// The device on the machine's bus that a kind takes.
const DEVICES: &[(&str, &str)] = &[
    ("block", "virtio-blk"),
    ("net", "virtio-net"),
    ("vsock", "vhost-user-vsock"),
    ("fs", "vhost-user-fs"),
    ("balloon", BALLOON),
    ("rng", "virtio-rng"),
];

/// Whatever the machine is.
const NEVER: &[(&str, &str)] = &[
    ("tdx", "the launcher starts no confidential guests yet"),
    ("sev-snp", "the launcher starts no confidential guests yet"),
];

const NOT_WITH_MICROVM: &[(&str, &str)] = &[
    ("block-hotplug", "microvm takes no devices while it runs; machine_type = \"q35\" does"),
    ("net-hotplug", "microvm takes no devices while it runs; machine_type = \"q35\" does"),
    ("pmem", "microvm has no place for pmem images; machine_type = \"q35\" has"),
    ("vfio", "microvm has no PCI for devices of the host; machine_type = \"q35\" has"),
    ("resize-vcpus", "microvm keeps the number that it was made with; machine_type = \"q35\" does not"),
    ("resize-memory", "microvm keeps what it was made with; machine_type = \"q35\" does not"),
];

/// Tells what the `installed` QEMU can do with such a machine.
pub fn tell(installed: &Installed, machine_type: MachineType, able: &mut CapabilitiesResponse) {
    let can_give = |device| installed.can_give(&machine_type.driver(device));
    never(NEVER, able);
    for (kind, device) in DEVICES {
        Device(kind).tell(can_give(device), able);
    }
    Device("console").tell(installed.can_give("isa-serial"), able);
    Operation("pause").tell(Ok(()), able);
    Operation("snapshot").tell(Ok(()), able);
    Operation("resize-balloon").tell(can_give(BALLOON), able);
    match machine_type {
        MachineType::Microvm => never(NOT_WITH_MICROVM, able),
        MachineType::Q35 => {
            let slots = installed.can_give("pcie-root-port");
            let vfio = can_give("vfio").and_then(|()| vfio::available());
            Hotplug("block").tell(slots.clone(), able);
            Hotplug("net").tell(slots.clone(), able);
            Hotplug("vfio").tell(slots.and(vfio.clone()), able);
            Device("vfio").tell(vfio, able);
            Device("pmem").tell(can_give("virtio-pmem"), able);
            Operation("resize-vcpus").tell(Ok(()), able);
            Operation("resize-memory").tell(can_give("virtio-mem"), able);
        }
    }
}
