//! The disks and network cards that microvm's guest always sees, empty at first: four and two. Each takes one device; disks
//! also while the guest runs.
//!
//! It keeps no state of the VM; what it remembers is which slot has which device.

use std::sync::Mutex;

use caisson_protocol::vmm::{Block, Device, Net, device::Kind};
use caisson_vmm_launcher::{Error, Result, qmp::Qmp, request};
use serde_json::{Value, json};

/// `MMIO_REPLACEABLE_BLK_NR`, machine/src/micro_common/mod.rs.
const DISKS: usize = 4;
/// `MMIO_REPLACEABLE_NET_NR`.
const CARDS: usize = 2;

/// The slots of one VM, each with the name of its device.
#[derive(Debug, Default)]
pub struct Slots {
    disks: Mutex<[Option<String>; DISKS]>,
    cards: Mutex<[Option<String>; CARDS]>,
}

/// What another launcher needs to know of them: the disks, and the network cards.
pub type Names = ([Option<String>; DISKS], [Option<String>; CARDS]);

impl Slots {
    /// Those of an adopted VM.
    pub fn adopt((disks, cards): Names) -> Self {
        Self { disks: Mutex::new(disks), cards: Mutex::new(cards) }
    }

    /// Which slot has which device.
    pub fn names(&self) -> Names {
        let disks = self.disks.lock().expect("nobody panics with the slots").clone();
        (disks, self.cards.lock().expect("nobody panics with the slots").clone())
    }

    /// Gives a device that the VM is born with its slot.
    ///
    /// # Errors
    /// When there is none left, or the device needs none.
    pub fn take(&self, id: &str, kind: &Kind) -> Result<usize> {
        match kind {
            Kind::Block(_) => take(&mut *self.disks.lock().expect("nobody panics with the slots"), id, "disks"),
            Kind::Net(_) => take(&mut *self.cards.lock().expect("nobody panics with the slots"), id, "network cards"),
            other => Err(unsupported(other)),
        }
    }

    /// Fills a slot while the guest runs, and answers where the guest finds the device.
    ///
    /// # Errors
    /// For what is no disk. A network card has another address then than the guest has seen when it started, and drops what is
    /// sent to that (`CtrlInfo::filter_packets`, virtio/src/device/net.rs of version 2.5.0).
    pub async fn attach(&self, device: &Device, qmp: &Qmp) -> Result<String> {
        let (id, kind) = (device.id.as_str(), request::kind(device)?);
        let Kind::Block(block) = kind else { return Err(unsupported(kind)) };
        let slot = self.take(id, kind)?;
        let (add, device_add) = commands(id, block, slot);
        let attached = async {
            qmp.execute("blockdev-add", add).await?;
            qmp.execute("device_add", device_add).await
        };
        if let Err(error) = attached.await {
            self.give_back(id);
            // It also forgets what was only half added; when nothing was, it says so, and that is no news.
            let _ = qmp.execute("device_del", json!({ "id": id })).await;
            return Err(error);
        }
        Ok(format!("serial:{id}"))
    }

    /// Empties the slot of the disk that is called `id`. The guest is not asked.
    ///
    /// # Errors
    /// When StratoVirt has no such disk.
    pub async fn detach(&self, id: &str, qmp: &Qmp) -> Result<()> {
        if self.cards.lock().expect("nobody panics with the slots").iter().flatten().any(|card| card == id) {
            return Err(Error::Invalid(format!("no device was attached as \"{id}\" while the VM ran")));
        }
        qmp.execute("device_del", json!({ "id": id })).await?;
        self.give_back(id);
        Ok(())
    }

    fn give_back(&self, id: &str) {
        give_back(&mut *self.disks.lock().expect("nobody panics with the slots"), id);
        give_back(&mut *self.cards.lock().expect("nobody panics with the slots"), id);
    }
}

/// # Errors
/// When the card `id` is to have more queues than the slots' cards have.
pub fn single_queue(id: &str, net: &Net) -> Result<()> {
    if net.queue_pairs <= 1 {
        return Ok(());
    }
    let pairs = net.queue_pairs;
    Err(Error::Unsupported(format!(
        "network device \"{id}\" cannot have {pairs} queue pairs: StratoVirt's microvm has one"
    )))
}

fn take(slots: &mut [Option<String>], id: &str, what: &str) -> Result<usize> {
    if slots.iter().flatten().any(|name| name == id) {
        return Err(Error::Invalid(format!("a device is attached as \"{id}\" already")));
    }
    let count = slots.len();
    let Some((number, slot)) = slots.iter_mut().enumerate().find(|(_, slot)| slot.is_none()) else {
        return Err(Error::Invalid(format!("StratoVirt's microvm has {count} {what}, and each is in use")));
    };
    *slot = Some(id.to_owned());
    Ok(number)
}

fn give_back(slots: &mut [Option<String>], id: &str) {
    for slot in slots.iter_mut().filter(|slot| slot.as_deref() == Some(id)) {
        *slot = None;
    }
}

/// What makes the host's side of a disk, and what puts it into `slot`.
fn commands(id: &str, block: &Block, slot: usize) -> (Value, Value) {
    let file = json!({ "driver": "file", "filename": block.path });
    let cache = json!({ "direct": false });
    let add = json!({ "node-name": id, "file": file, "read-only": block.read_only, "cache": cache });
    let addr = format!("{slot:#x}");
    (add, json!({ "id": id, "driver": "virtio-blk-mmio", "drive": id, "addr": addr, "serial": id }))
}

fn unsupported(kind: &Kind) -> Error {
    let kind = request::kind_name(kind);
    Error::Unsupported(format!("attaching a {kind} device is not supported with stratovirt"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Kind {
        Kind::Block(Block { path: "/disk".into(), ..Default::default() })
    }

    #[test]
    fn a_full_machine_says_how_many_it_takes() {
        let slots = Slots::default();
        for number in 0..4 {
            slots.take(&format!("disk-{number}"), &disk()).unwrap();
        }
        let error = slots.take("one-more", &disk()).unwrap_err().to_string();
        assert_eq!(error, "StratoVirt's microvm has 4 disks, and each is in use");
    }

    #[test]
    fn a_slot_that_is_given_back_can_be_taken_again() {
        let slots = Slots::default();
        slots.take("a", &disk()).unwrap();
        slots.take("b", &disk()).unwrap();
        slots.give_back("a");
        assert_eq!(slots.take("c", &disk()).unwrap(), 0);
    }

    fn late(id: &str, kind: Kind) -> Device {
        Device { id: id.into(), kind: Some(kind), ..Default::default() }
    }

    fn card() -> Kind {
        Kind::Net(Net { tap: "tap0".into(), mac: "02:00:00:00:00:01".into(), ..Default::default() })
    }

    #[tokio::test]
    async fn devices_come_and_go_in_any_order() {
        let (qmp, slots) = (crate::fake::qmp(), Slots::default());
        qmp.negotiate().await.unwrap();
        assert_eq!(slots.attach(&late("a", disk()), &qmp).await.unwrap(), "serial:a");
        slots.attach(&late("b", disk()), &qmp).await.unwrap();
        slots.detach("a", &qmp).await.unwrap();
        slots.attach(&late("c", disk()), &qmp).await.unwrap();
    }

    #[tokio::test]
    async fn a_card_neither_comes_nor_goes() {
        let (qmp, slots) = (crate::fake::qmp(), Slots::default());
        assert!(matches!(slots.attach(&late("late", card()), &qmp).await, Err(Error::Unsupported(_))));
        slots.take("net", &card()).unwrap();
        let refusal = slots.detach("net", &qmp).await.unwrap_err().to_string();
        assert_eq!(refusal, "no device was attached as \"net\" while the VM ran");
    }

    #[tokio::test]
    async fn a_slot_whose_device_was_refused_is_free_again() {
        let (qmp, slots) = (crate::fake::qmp(), Slots::default());
        // What StratoVirt has and the slots do not know of.
        let drive = json!({ "node-name": "taken", "file": { "driver": "file", "filename": "/disk" } });
        qmp.execute("blockdev-add", drive).await.unwrap();
        let refusal = slots.attach(&late("taken", disk()), &qmp).await.unwrap_err().to_string();
        assert_eq!(refusal, "StratoVirt's blockdev-add: taken is already registered.");
        for id in ["a", "b", "c", "d"] {
            slots.attach(&late(id, disk()), &qmp).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_not_there_cannot_be_detached() {
        let refusal = Slots::default().detach("nothing", &crate::fake::qmp()).await.unwrap_err().to_string();
        assert_eq!(refusal, "StratoVirt's device_del: Device nothing not found");
    }

    #[tokio::test]
    async fn a_guest_is_stopped_only_while_it_runs() {
        let qmp = crate::fake::qmp();
        qmp.execute("cont", json!({})).await.unwrap();
        qmp.execute("stop", json!({})).await.unwrap();
        assert!(qmp.execute("stop", json!({})).await.is_err());
    }
}
