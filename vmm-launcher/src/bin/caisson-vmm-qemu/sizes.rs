//! More and fewer processors and memory while the VM runs: ACPI's processor hotplug, `docs/system/cpu-hotplug.rst` of QEMU,
//! and virtio-mem, virtio 1.2 §5.15.

use std::{
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use caisson_protocol::vmm::{ResizeBalloonRequest, VmConfig};
use caisson_vmm_launcher::{
    Error, Result, balloon, huge_pages,
    qmp::Qmp,
    size::{Size, Sizes as Known},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::options::MachineType;

/// The virtio-mem device's name.
pub const MEMORY_ID: &str = "more-memory";
/// Its path in QEMU's tree of objects.
const MEMORY_PATH: &str = "/machine/peripheral/more-memory";
/// In MiB: what the device gives and takes at a time; a huge page is as large.
pub const MEMORY_BLOCK_MIB: u64 = huge_pages::SIZE_MIB;
/// A guest without a driver never takes what it is given; one with little free memory may not let go of it.
const DEADLINE: Duration = Duration::from_secs(20);
/// Hotplugged processors are called `vcpu-1`, `vcpu-2`, …
const VCPU: &str = "vcpu-";
const MICROVM: &str = "QEMU's microvm keeps the size that it was made with; machine_type = \"q35\" can be resized";

/// One VM's sizes.
#[derive(Debug)]
pub struct Sizes {
    machine_type: MachineType,
    huge_pages: bool,
    known: Mutex<Known>,
}

/// What another launcher needs to know of them.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct KnownSizes {
    huge_pages: bool,
    sizes: Known,
}

impl Sizes {
    /// Those of a new `vm`.
    pub fn of(vm: &VmConfig, machine_type: MachineType) -> Self {
        Self { machine_type, huge_pages: vm.huge_pages, known: Mutex::new(Known::of(vm)) }
    }

    /// Those of an adopted VM.
    pub fn adopt(machine_type: MachineType, known: KnownSizes) -> Self {
        Self { machine_type, huge_pages: known.huge_pages, known: Mutex::new(known.sizes) }
    }

    /// For another launcher.
    pub fn known(&self) -> KnownSizes {
        KnownSizes { huge_pages: self.huge_pages, sizes: *self.lock() }
    }

    pub fn now(&self) -> Size {
        self.lock().now
    }

    /// Whether it is as big as it was made.
    pub fn are_the_first(&self) -> bool {
        let sizes = self.lock();
        sizes.now == sizes.first
    }

    /// Plugs or unplugs processors, and answers how many there are.
    pub async fn resize_vcpus(&self, wanted: u32, qmp: &Qmp) -> Result<u32> {
        self.resizable()?;
        self.lock().can_have_vcpus(wanted)?;
        let processors = processors(&qmp.execute("query-hotpluggable-cpus", json!({})).await?);
        let present = processors.iter().filter(|processor| processor.is_present).count() as u32;
        let changed = if wanted > present {
            plug(&processors, (wanted - present) as usize, qmp).await
        } else {
            unplug(&processors, (present - wanted) as usize, qmp).await
        };
        let (count, result) = match changed {
            Ok(()) => (wanted, Ok(wanted)),
            Err((done, error)) if wanted > present => (present + done, Err(error)),
            Err((done, error)) => (present - done, Err(error)),
        };
        self.lock().now.vcpus = count;
        result
    }

    /// Gives or takes memory, and answers how much there is. The guest has to play along.
    pub async fn resize_memory(&self, wanted_mib: u64, qmp: &Qmp) -> Result<u64> {
        self.resizable()?;
        let Known { first, most, now, .. } = *self.lock();
        self.lock().can_have_memory(wanted_mib)?;
        let (least, most, now) = (first.memory_mib, most.memory_mib, now.memory_mib);
        if most == least {
            return Ok(least);
        }
        let more_mib = (wanted_mib - least).next_multiple_of(MEMORY_BLOCK_MIB).min(room_mib(least, most));
        if self.huge_pages {
            huge_pages::can_take((least + more_mib).saturating_sub(now))?;
        }
        let mut events = qmp.events();
        request_memory(more_mib << 20, qmp).await?;
        let reached = async {
            while plugged(qmp).await? != more_mib << 20 {
                qmp.next(&mut events, &["MEMORY_DEVICE_SIZE_CHANGE"]).await?;
            }
            Ok(())
        };
        let reached = timeout(DEADLINE, reached).await;
        let plugged_mib = plugged(qmp).await? >> 20;
        self.lock().now.memory_mib = least + plugged_mib;
        match reached {
            Ok(Ok(())) => Ok(least + plugged_mib),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                // Or it would go on some day.
                request_memory(plugged_mib << 20, qmp).await?;
                let (has, seconds) = (least + plugged_mib, DEADLINE.as_secs());
                Err(Error::Hypervisor(format!(
                    "the guest has {has} MiB and did not go on to {wanted_mib} MiB within {seconds} s"
                )))
            }
        }
    }

    /// Has the guest give memory to the balloon or take it back, and answers how much the balloon holds.
    pub async fn resize_balloon(&self, request: &ResizeBalloonRequest, qmp: &Qmp) -> Result<u64> {
        let sizes = *self.lock();
        balloon::resize(request, &sizes, qmp).await
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("nobody panics with the sizes")
    }

    fn resizable(&self) -> Result<()> {
        match self.machine_type {
            MachineType::Microvm => Err(Error::Unsupported(MICROVM.into())),
            MachineType::Q35 => Ok(()),
        }
    }
}

/// In MiB: how much the virtio-mem device of a VM with `memory_mib` can hold.
pub fn room_mib(memory_mib: u64, max_memory_mib: u64) -> u64 {
    max_memory_mib.saturating_sub(memory_mib) / MEMORY_BLOCK_MIB * MEMORY_BLOCK_MIB
}

async fn request_memory(bytes: u64, qmp: &Qmp) -> Result<()> {
    let set = json!({ "path": MEMORY_PATH, "property": "requested-size", "value": bytes });
    qmp.execute("qom-set", set).await.map(drop)
}

/// In bytes: what the guest has taken.
async fn plugged(qmp: &Qmp) -> Result<u64> {
    let size = qmp.execute("qom-get", json!({ "path": MEMORY_PATH, "property": "size" })).await?;
    size.as_u64().ok_or_else(|| Error::Hypervisor(format!("QEMU says that its memory device's size is {size}")))
}

/// A place for a processor.
#[derive(Debug, PartialEq)]
struct Processor {
    /// How a processor in this place is plugged in.
    device_add: Value,
    is_present: bool,
    /// The name of a processor that was plugged in here while the VM ran.
    plugged: Option<String>,
}

/// `query-hotpluggable-cpus`' answer, in the order of the processors.
fn processors(answer: &Value) -> Vec<Processor> {
    let mut places: Vec<&Value> = answer.as_array().into_iter().flatten().collect();
    let place = |place: &Value| ["socket-id", "die-id", "core-id", "thread-id"].map(|key| place["props"][key].as_u64());
    places.sort_by_key(|one| place(one));
    let processor = |(index, place): (usize, &&Value)| {
        let path = place["qom-path"].as_str();
        let mut device_add = place["props"].clone();
        device_add["driver"] = place["type"].clone();
        device_add["id"] = format!("{VCPU}{index}").into();
        let plugged = path.and_then(|path| path.strip_prefix("/machine/peripheral/"));
        Processor { device_add, is_present: path.is_some(), plugged: plugged.map(str::to_owned) }
    };
    places.iter().enumerate().map(processor).collect()
}

/// A failure comes with how many there were before.
async fn plug(processors: &[Processor], count: usize, qmp: &Qmp) -> Result<(), (u32, Error)> {
    let absent = processors.iter().filter(|processor| !processor.is_present);
    for (done, processor) in absent.take(count).enumerate() {
        let added = qmp.execute("device_add", processor.device_add.clone()).await;
        added.map_err(|error| (done as u32, error))?;
    }
    Ok(())
}

/// The last first.
async fn unplug(processors: &[Processor], count: usize, qmp: &Qmp) -> Result<(), (u32, Error)> {
    let plugged = processors.iter().rev().filter_map(|processor| processor.plugged.as_deref());
    for (done, id) in plugged.take(count).enumerate() {
        let gone = take_out(id, qmp).await;
        gone.map_err(|error| (done as u32, error))?;
    }
    Ok(())
}

/// Has the guest let go of a processor, and waits until its place is empty. A `DEVICE_DELETED` of its own does not come
/// from every accelerator; the guest's word that it has let go always does.
async fn take_out(id: &str, qmp: &Qmp) -> Result<()> {
    let mut events = qmp.events();
    qmp.execute("device_del", json!({ "id": id })).await?;
    let refused = || Error::Hypervisor(format!("the guest does not let go of processor \"{id}\""));
    let gone = async {
        while is_plugged(id, qmp).await? {
            let told = qmp.wait(&mut events, |event| match event["event"].as_str() {
                Some("ACPI_DEVICE_OST") if has_refused(&event["data"]["info"], id) => Some(Err(refused())),
                Some("ACPI_DEVICE_OST" | "DEVICE_DELETED") | None => Some(Ok(())),
                Some(_) => None,
            });
            told.await?;
        }
        Ok(())
    };
    timeout(DEADLINE, gone).await.unwrap_or_else(|_| {
        let seconds = DEADLINE.as_secs();
        Err(Error::Hypervisor(format!("the guest did not let go of processor \"{id}\" within {seconds} s")))
    })
}

async fn is_plugged(id: &str, qmp: &Qmp) -> Result<bool> {
    let places = processors(&qmp.execute("query-hotpluggable-cpus", json!({})).await?);
    Ok(places.iter().any(|place| place.plugged.as_deref() == Some(id)))
}

/// `_OST`, ACPI 6.5 §6.3.5: of an ejection, with a status that is neither success nor "in progress".
fn has_refused(info: &Value, id: &str) -> bool {
    const EJECTION: [u64; 2] = [3, 0x103];
    const SUCCESS: u64 = 0;
    const IN_PROGRESS: u64 = 0x84;
    let is_ejection = info["source"].as_u64().is_some_and(|source| EJECTION.contains(&source));
    info["device"] == id && is_ejection && ![Some(SUCCESS), Some(IN_PROGRESS)].contains(&info["status"].as_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Value {
        let place = |core: u32| json!({ "props": { "core-id": core, "thread-id": 0, "socket-id": 0 }, "vcpus-count": 1, "type": "max-x86_64-cpu" });
        let (mut first, mut second) = (place(0), place(1));
        first["qom-path"] = "/machine/unattached/device[0]".into();
        second["qom-path"] = "/machine/peripheral/vcpu-1".into();
        // As QEMU has them: the last first.
        json!([place(2), second, first])
    }

    #[test]
    fn places_are_in_the_order_of_the_processors() {
        let processors = processors(&answer());
        assert_eq!(processors.iter().map(|one| one.is_present).collect::<Vec<_>>(), [true, true, false]);
        let expected =
            json!({ "driver": "max-x86_64-cpu", "id": "vcpu-2", "core-id": 2, "thread-id": 0, "socket-id": 0 });
        assert_eq!(processors[2].device_add, expected);
    }

    #[test]
    fn only_what_was_plugged_in_can_be_taken_out() {
        let processors = processors(&answer());
        assert_eq!(
            processors.iter().map(|one| one.plugged.as_deref()).collect::<Vec<_>>(),
            [None, Some("vcpu-1"), None]
        );
    }

    #[test]
    fn an_answer_that_is_something_else_has_no_places() {
        assert_eq!(processors(&json!({ "error": 1 })), []);
    }

    #[test]
    fn a_refusal_is_told_from_progress() {
        let told = |status: u64| has_refused(&json!({ "device": "vcpu-2", "source": 3, "status": status }), "vcpu-2");
        assert_eq!([0, 0x84, 1, 0x82].map(told), [false, false, true, true]);
    }

    #[test]
    fn room_is_whole_blocks() {
        assert_eq!([room_mib(256, 513), room_mib(256, 0), room_mib(256, 256)], [256, 0, 0]);
    }
}
