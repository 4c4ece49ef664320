//! Devices that come and go while the VM runs: each takes one of q35's PCI Express slots, `docs/pcie.txt` of QEMU.
//!
//! It keeps no state of the VM; what it remembers is which slot has which device.

use std::{collections::HashMap, os::fd::OwnedFd, sync::Mutex, time::Duration};

use caisson_protocol::vmm::{Device, device::Kind};
use caisson_vmm_launcher::{
    Error, Result,
    qmp::{DEVICE_NOT_FOUND, Failure, Qmp},
    request,
    vfio::HostDevice,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{sync::broadcast::Receiver, time::timeout};

use crate::{accelerator, card::Card, command_line::block_driver, options::MachineType, qemu::status};

/// A guest without a working driver never lets go of a device.
const DETACH_DEADLINE: Duration = Duration::from_secs(20);
/// How QEMU refuses to ask the guest for a device twice; its class, `GenericError`, does not tell.
const UNDER_WAY: &str = "already in the process of unplug";

/// The slots of one VM.
#[derive(Debug)]
pub struct Slots {
    machine_type: MachineType,
    devices: Mutex<Devices>,
}

/// What another launcher needs to know of them.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Devices {
    free: Vec<u8>,
    attached: HashMap<String, Attached>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Attached {
    slot: u8,
    /// How QEMU forgets the host's side of the device, if it has one of its own.
    forget: Option<Forget>,
}

/// A command with its arguments.
type Forget = (String, Value);

/// The slot's name as a bus.
pub fn bus(slot: u8) -> String {
    format!("slot-{slot}")
}

impl Slots {
    /// `count` empty slots.
    pub fn new(machine_type: MachineType, count: u8) -> Self {
        Self {
            machine_type,
            devices: Mutex::new(Devices { free: (0..count).rev().collect(), attached: HashMap::new() }),
        }
    }

    /// Those of an adopted VM.
    pub fn adopt(machine_type: MachineType, devices: Devices) -> Self {
        Self { machine_type, devices: Mutex::new(devices) }
    }

    /// What has them.
    pub fn machine_type(&self) -> MachineType {
        self.machine_type
    }

    /// Which slot has which device.
    pub fn devices(&self) -> Devices {
        self.devices.lock().expect("nobody panics with the slots").clone()
    }

    /// Whether nothing came while the VM ran that has not gone again.
    pub fn are_empty(&self) -> bool {
        self.devices.lock().expect("nobody panics with the slots").attached.is_empty()
    }

    /// Adds `device`, and answers where the guest finds it.
    pub async fn attach(&self, device: &Device, qmp: &Qmp) -> Result<String> {
        let id = device.id.as_str();
        self.may_be_filled()?;
        let Parts { give, add, forget, mut device_add, address } = parts(device, qmp).await?;
        let slot = self.take(id, &forget)?;
        device_add["id"] = id.into();
        device_add["bus"] = bus(slot).into();
        let attached = async {
            let given: Vec<_> = give.iter().map(|(name, _)| name.clone()).collect();
            if let Err(failure) = add_host_side(give, add, qmp).await {
                for name in given {
                    // What QEMU did not get or has used up already it does not know.
                    let _ = qmp.execute("closefd", json!({ "fdname": name })).await;
                }
                return Err(failure);
            }
            let added = qmp.ask("device_add", device_add).await;
            if let (Err(Failure::Refused { .. }), Some((command, arguments))) = (&added, forget) {
                // What went wrong first is told.
                let _ = qmp.execute(&command, arguments).await;
            }
            added
        };
        match attached.await {
            Ok(_) => Ok(address),
            Err(refused @ Failure::Refused { .. }) => {
                self.give_back(id);
                Err(refused.into())
            }
            // The device may come yet, and keeps its slot until it is detached.
            Err(unanswered @ Failure::NoAnswer(_)) => Err(unanswered.into()),
        }
    }

    /// Takes the device away that was attached as `id`, once the guest has let go of it.
    pub async fn detach(&self, id: &str, qmp: &Qmp) -> Result<()> {
        let attached = self.devices.lock().expect("nobody panics with the slots").attached.get(id).cloned();
        let attached = attached.ok_or_else(|| {
            Error::Invalid(format!("no device was attached as \"{}\" while the VM ran", id.escape_debug()))
        })?;
        status::must_run("detach a device from", qmp).await?;
        let mut events = qmp.events();
        match qmp.ask("device_del", json!({ "id": id })).await {
            // The guest has let go of it since somebody asked before, and did not wait so long.
            Err(Failure::Refused { class, .. }) if class == DEVICE_NOT_FOUND => {}
            Err(Failure::Refused { words, .. }) if words.contains(UNDER_WAY) => let_go(id, &mut events, qmp).await?,
            Err(failure) => return Err(failure.into()),
            Ok(_) => let_go(id, &mut events, qmp).await?,
        }
        if let Some((command, arguments)) = attached.forget {
            qmp.execute(&command, arguments).await?;
        }
        self.give_back(id);
        Ok(())
    }

    fn may_be_filled(&self) -> Result<()> {
        match self.machine_type {
            MachineType::Q35 => Ok(()),
            MachineType::Microvm => Err(Error::Unsupported(
                "QEMU's microvm takes no devices while it runs; machine_type = \"q35\" does".into(),
            )),
        }
    }

    fn take(&self, id: &str, forget: &Option<Forget>) -> Result<u8> {
        let devices = &mut *self.devices.lock().expect("nobody panics with the slots");
        if devices.attached.contains_key(id) {
            return Err(Error::Invalid(format!("a device is attached as \"{id}\" already")));
        }
        let slot = devices.free.pop().ok_or_else(|| {
            Error::Invalid("every slot has a device: detach one, or raise hotplug_slots in the configuration".into())
        })?;
        devices.attached.insert(id.to_owned(), Attached { slot, forget: forget.clone() });
        Ok(slot)
    }

    fn give_back(&self, id: &str) {
        let devices = &mut *self.devices.lock().expect("nobody panics with the slots");
        if let Some(attached) = devices.attached.remove(id) {
            devices.free.push(attached.slot);
        }
    }
}

/// Waits until the guest has let go of the device, as it was asked to.
async fn let_go(id: &str, events: &mut Receiver<Value>, qmp: &Qmp) -> Result<()> {
    let gone = qmp.wait(events, |event| match event["event"].as_str() {
        _ if event["data"]["device"] != id => None,
        Some("DEVICE_DELETED") => Some(Ok(())),
        Some("DEVICE_UNPLUG_GUEST_ERROR") => {
            Some(Err(Error::Hypervisor(format!("the guest does not let go of device \"{id}\""))))
        }
        _ => None,
    });
    timeout(DETACH_DEADLINE, gone).await.unwrap_or_else(|_| {
        let seconds = DETACH_DEADLINE.as_secs();
        Err(Error::Hypervisor(format!("the guest did not let go of device \"{id}\" within {seconds} s")))
    })
}

/// What makes and ends a device: its host's side, and then its guest's side.
struct Parts {
    /// Descriptors that `add` names.
    give: Vec<(String, OwnedFd)>,
    add: Option<(&'static str, Value)>,
    forget: Option<Forget>,
    device_add: Value,
    address: String,
}

async fn add_host_side(
    give: Vec<(String, OwnedFd)>,
    add: Option<(&'static str, Value)>,
    qmp: &Qmp,
) -> Result<(), Failure> {
    for (name, descriptor) in give {
        qmp.give(&name, descriptor).await?;
    }
    match add {
        Some((command, arguments)) => qmp.ask(command, arguments).await.map(drop),
        None => Ok(()),
    }
}

async fn parts(device: &Device, qmp: &Qmp) -> Result<Parts> {
    let id = device.id.as_str();
    match request::kind(device)? {
        Kind::Block(block) => {
            let node = format!("disk-{id}");
            let file = json!({ "driver": block_driver(&block.path), "filename": block.path });
            let add = json!({ "driver": "raw", "node-name": node, "read-only": block.read_only, "file": file });
            Ok(Parts {
                give: Vec::new(),
                add: Some(("blockdev-add", add)),
                forget: Some(("blockdev-del".to_owned(), json!({ "node-name": node }))),
                device_add: json!({
                    "driver": "virtio-blk-pci", "drive": node, "serial": id, "werror": "report", "rerror": "report"
                }),
                address: format!("serial:{id}"),
            })
        }
        Kind::Net(net) => {
            let netdev = format!("net-{id}");
            let card = Card::open(net, accelerator::of(qmp).await?)?;
            let several = card.taps.len() > 1;
            let device_add =
                json!({ "driver": "virtio-net-pci", "netdev": netdev, "mac": net.mac, "romfile": "", "mq": several });
            let mut give = named(&format!("tap-{id}"), card.taps);
            let mut add = json!({ "type": "tap", "id": netdev, "fds": names(&give) });
            if !card.vhosts.is_empty() {
                let vhosts = named(&format!("vhost-{id}"), card.vhosts);
                add["vhost"] = true.into();
                add["vhostfds"] = names(&vhosts).into();
                give.extend(vhosts);
            }
            let forget = Some(("netdev_del".to_owned(), json!({ "id": netdev })));
            Ok(Parts { give, add: Some(("netdev_add", add)), forget, device_add, address: String::new() })
        }
        Kind::Vfio(vfio) => {
            let host = HostDevice::find(&vfio.address)?.address;
            let device_add = json!({ "driver": "vfio-pci", "host": host });
            Ok(Parts { give: Vec::new(), add: None, forget: None, device_add, address: String::new() })
        }
        other => {
            let kind = request::kind_name(other);
            Err(Error::Unsupported(format!("attaching a {kind} device is not supported with qemu")))
        }
    }
}

/// `descriptors` with names that begin with `prefix`.
fn named(prefix: &str, descriptors: Vec<OwnedFd>) -> Vec<(String, OwnedFd)> {
    (0..).zip(descriptors).map(|(number, fd)| (format!("{prefix}-{number}"), fd)).collect()
}

/// As an argument lists them.
fn names(descriptors: &[(String, OwnedFd)]) -> String {
    descriptors.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use caisson_protocol::vmm::Block;

    use super::*;
    use crate::fake::{self, done, refused};

    fn disk() -> Device {
        let disk = Block { path: "/disk".into(), ..Default::default() };
        Device { id: "late".into(), kind: Some(Kind::Block(disk)), ..Default::default() }
    }

    /// A running VM to whose only slot the disk `late` was attached; `device_del` says what comes of taking it away.
    async fn attached(device_del: Vec<Value>) -> (Slots, Qmp) {
        let qmp = fake::qmp(move |command, _| match command {
            "query-status" => vec![json!({ "return": { "status": "running" } })],
            "device_del" => device_del.clone(),
            _ => vec![done()],
        });
        let slots = Slots::new(MachineType::Q35, 1);
        assert_eq!(slots.attach(&disk(), &qmp).await.unwrap(), "serial:late");
        (slots, qmp)
    }

    fn event(name: &str) -> Value {
        json!({ "event": name, "data": { "device": "late" } })
    }

    #[tokio::test]
    async fn a_device_is_gone_once_the_guest_has_let_go() {
        let other = json!({ "event": "DEVICE_DELETED", "data": { "device": "other" } });
        let (slots, qmp) = attached(vec![done(), other, event("DEVICE_DELETED")]).await;
        slots.detach("late", &qmp).await.unwrap();
        assert!(slots.are_empty());
    }

    #[tokio::test]
    async fn a_guest_that_does_not_let_go_keeps_its_device() {
        let (slots, qmp) = attached(vec![done(), event("DEVICE_UNPLUG_GUEST_ERROR")]).await;
        let refusal = slots.detach("late", &qmp).await.unwrap_err().to_string();
        assert_eq!(refusal, "the guest does not let go of device \"late\"");
        assert!(!slots.are_empty());
    }

    #[tokio::test]
    async fn a_device_that_the_guest_has_let_go_of_too_late_is_gone_the_next_time() {
        let (slots, qmp) = attached(vec![refused("DeviceNotFound", "Device 'late' not found")]).await;
        slots.detach("late", &qmp).await.unwrap();
        assert!(slots.are_empty());
    }

    #[tokio::test]
    async fn a_guest_that_was_asked_before_is_waited_for() {
        let under_way = refused("GenericError", "Device late is already in the process of unplug");
        let (slots, qmp) = attached(vec![under_way, event("DEVICE_DELETED")]).await;
        slots.detach("late", &qmp).await.unwrap();
        assert!(slots.are_empty());
    }

    #[tokio::test]
    async fn a_qemu_that_ends_is_not_the_guests_fault() {
        let (slots, qmp) = attached(vec![done(), Value::Null]).await;
        assert_eq!(slots.detach("late", &qmp).await.unwrap_err().to_string(), "QEMU has ended");
    }

    #[tokio::test]
    async fn a_guest_that_stands_still_is_not_asked_for_a_device() {
        let slots = Slots::new(MachineType::Q35, 1);
        let qmp = fake::qmp(|command, _| match command {
            "query-status" => vec![json!({ "return": { "status": "paused" } })],
            _ => vec![done()],
        });
        slots.attach(&disk(), &qmp).await.unwrap();
        let refusal = slots.detach("late", &qmp).await.unwrap_err().to_string();
        assert_eq!(refusal, "cannot detach a device from a VM that is paused");
    }

    /// The answer of a QEMU to a new disk, all of whose commands but `blockdev-add` end as `answer` has it.
    async fn attach(answer: Value) -> (String, Slots) {
        let qmp = fake::qmp(move |command, _| vec![if command == "blockdev-add" { done() } else { answer.clone() }]);
        let slots = Slots::new(MachineType::Q35, 1);
        (slots.attach(&disk(), &qmp).await.unwrap_err().to_string(), slots)
    }

    #[tokio::test]
    async fn a_device_that_was_refused_leaves_its_slot_and_its_reason() {
        let (why, slots) = attach(refused("GenericError", "no")).await;
        assert_eq!(why, "QEMU's device_add: no");
        assert!(slots.are_empty());
    }

    #[tokio::test]
    async fn a_device_that_may_come_yet_keeps_its_slot() {
        let (why, slots) = attach(Value::Null).await;
        assert_eq!(why, "QEMU's device_add: QEMU has ended");
        assert!(!slots.are_empty());
    }

    fn forget() -> Option<Forget> {
        Some(("blockdev-del".to_owned(), json!({})))
    }

    #[test]
    fn a_full_machine_names_the_key_to_raise() {
        let slots = Slots::new(MachineType::Q35, 1);
        slots.take("a", &forget()).unwrap();
        assert!(slots.take("b", &forget()).unwrap_err().to_string().contains("hotplug_slots"));
    }

    #[test]
    fn a_slot_that_is_given_back_can_be_taken_again() {
        let slots = Slots::new(MachineType::Q35, 1);
        slots.take("a", &forget()).unwrap();
        slots.give_back("a");
        assert_eq!(slots.take("b", &forget()).unwrap(), 0);
    }

    #[test]
    fn a_name_cannot_be_attached_twice() {
        let slots = Slots::new(MachineType::Q35, 2);
        slots.take("a", &forget()).unwrap();
        assert_eq!(slots.take("a", &forget()).unwrap_err().to_string(), "a device is attached as \"a\" already");
    }

    #[test]
    fn microvm_names_the_machine_that_can() {
        let slots = Slots::new(MachineType::Microvm, 0);
        assert!(matches!(slots.may_be_filled(), Err(Error::Unsupported(why)) if why.contains("q35")));
    }
}
