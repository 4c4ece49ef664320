//! A StratoVirt that has its machine protocol and nothing behind it, but the slots of its microvm for disks. It refuses what
//! the real one was seen to refuse: ids that are no strings, fields that it does not know, slots that are occupied, and
//! devices whose host side it was not told of.

use std::collections::{HashMap, HashSet};

use caisson_vmm_launcher::qmp::Qmp;
use serde::Deserialize;
use serde_json::{Value, from_value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

macro_rules! body {
    ($name:ident { $($field:ident $(= $wire:literal)?: $type:ty),* $(,)? }) => {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code)]
        struct $name { $($(#[serde(rename = $wire)])? $field: $type),* }
    };
}

body!(Command { execute: String, arguments: Value, id: Option<String> });
body!(Nothing {});
body!(File { driver: String, filename: String });
body!(Cache { direct: Option<bool> });
body!(Drive { node_name = "node-name": String, file: File, cache: Option<Cache>, read_only = "read-only": Option<bool> });
body!(NewDevice {
    id: String,
    driver: String,
    addr: Option<String>,
    drive: Option<String>,
    serial: Option<String>,
});
body!(Named { id: String });

const DISKS: usize = 4;

#[derive(Default)]
struct Fake {
    running: bool,
    /// Host sides by their names.
    known: HashSet<String>,
    /// Disks by their slot.
    slots: HashMap<usize, String>,
}

/// A client of one whose guest has not started.
pub fn qmp() -> Qmp {
    let (client, server) = UnixStream::pair().unwrap();
    tokio::spawn(serve(server));
    Qmp::over("StratoVirt", client)
}

async fn serve(stream: UnixStream) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let greeting =
        json!({ "QMP": { "version": { "qemu": { "micro": 0, "minor": 0, "major": 5 } }, "capabilities": [] } });
    writer.write_all(format!("{greeting}\n").as_bytes()).await.unwrap();
    let mut fake = Fake::default();
    while let Ok(Some(line)) = lines.next_line().await {
        let answer = match serde_json::from_str::<Command>(&line) {
            Ok(command) => {
                let id = command.id.clone();
                let negotiates = command.execute == "qmp_capabilities";
                match fake.execute(command) {
                    // It forgets who asked.
                    Ok(()) if negotiates => json!({ "return": {} }),
                    Ok(()) => json!({ "return": {}, "id": id }),
                    Err(why) => json!({ "error": { "class": "GenericError", "desc": why }, "id": id }),
                }
            }
            // It does not know to which question this is the answer.
            Err(error) => json!({ "error": { "class": "GenericError", "desc": error.to_string() } }),
        };
        if writer.write_all(format!("{answer}\n").as_bytes()).await.is_err() {
            return;
        }
    }
}

impl Fake {
    fn execute(&mut self, command: Command) -> Result<(), String> {
        let Command { execute, arguments, .. } = command;
        match execute.as_str() {
            "qmp_capabilities" => read::<Nothing>(arguments).map(drop),
            "stop" => read::<Nothing>(arguments).and_then(|_| self.run(false, "Failed to pause VM")),
            "cont" => read::<Nothing>(arguments).and_then(|_| self.run(true, "Failed to resume VM")),
            "blockdev-add" => {
                let drive = read::<Drive>(arguments)?;
                match self.known.insert(drive.node_name.clone()) {
                    true => Ok(()),
                    false => Err(format!("{} is already registered.", drive.node_name)),
                }
            }
            "device_add" => self.add(&read(arguments)?),
            "device_del" => self.delete(&read::<Named>(arguments)?.id),
            _ => Err(format!("unknown variant `{execute}`")),
        }
    }

    fn run(&mut self, running: bool, otherwise: &str) -> Result<(), String> {
        if self.running == running {
            return Err(otherwise.to_owned());
        }
        self.running = running;
        Ok(())
    }

    fn add(&mut self, device: &NewDevice) -> Result<(), String> {
        if !self.known.contains(&device.id) {
            return Err("Failed to find device configuration.".into());
        }
        if device.driver != "virtio-blk-mmio" {
            return Err("Unsupported replaceable device type.".into());
        }
        if *device.drive.as_ref().ok_or("No drive set")? != device.id {
            return Err("The device is of another type".into());
        }
        let addr = device.addr.as_deref().and_then(|addr| usize::from_str_radix(addr.strip_prefix("0x")?, 16).ok());
        let slot = addr.ok_or_else(|| format!("Invalid addr for device {}", device.id))?;
        if slot >= DISKS {
            return Err(format!("A maximum of {DISKS} replaceable devices are supported."));
        }
        if self.slots.contains_key(&slot) {
            return Err(format!("The slot {slot} is occupied already."));
        }
        self.slots.insert(slot, device.id.clone());
        Ok(())
    }

    fn delete(&mut self, id: &str) -> Result<(), String> {
        self.slots.retain(|_, device| device != id);
        self.known.remove(id).then_some(()).ok_or_else(|| format!("Device {id} not found"))
    }
}

fn read<T: for<'a> Deserialize<'a>>(arguments: Value) -> Result<T, String> {
    from_value(arguments).map_err(|error| error.to_string())
}
