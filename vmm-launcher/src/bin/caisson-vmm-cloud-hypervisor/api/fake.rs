//! A Cloud Hypervisor that has an API and nothing behind it. It refuses what the real one was seen to refuse: a
//! configuration that contradicts itself, values of another type, calls in the wrong state, bodies where there are to be
//! none, network cards without as many descriptors as they have pairs of queues.

use std::collections::HashSet;

use hyper::StatusCode;
use serde::Deserialize;
use serde_json::{Value, from_value, json};
use tokio::net::UnixStream;

#[path = "../../../../tests/fakes/http_server.rs"]
mod http_server;

use http_server::Asked;

/// What the VM does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Vm {
    #[default]
    None,
    Configured,
    Running,
    Paused,
}

/// One such Cloud Hypervisor.
#[derive(Debug, Default)]
pub struct Fake {
    vm: Vm,
    devices: HashSet<String>,
    boot_vcpus: usize,
    max_vcpus: u64,
    memory: u64,
    hotplug_memory: u64,
    /// What was added: its guest takes it at once.
    hotplugged: u64,
    /// What it holds: its guest gives at once.
    balloon: Option<u64>,
    landlock: bool,
    shared_memory: bool,
    /// A request that it has not yet.
    without: Option<&'static str>,
}

macro_rules! body {
    ($name:ident { $($field:ident: $type:ty),* $(,)? }) => {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code)]
        struct $name { $($field: $type),* }
    };
}

body!(Config {
    cpus: Cpus,
    memory: Memory,
    payload: Payload,
    console: Console,
    serial: Console,
    landlock_enable: bool,
    landlock_rules: Option<Vec<Rule>>,
    disks: Option<Vec<Disk>>,
    fs: Option<Vec<Fs>>,
    pmem: Option<Vec<Pmem>>,
    vsock: Option<Vsock>,
    balloon: Option<Balloon>,
    rng: Option<Rng>,
});
body!(Cpus { boot_vcpus: u64, max_vcpus: u64 });
body!(Memory { size: u64, shared: bool, hotplug_method: Option<String>, hotplug_size: Option<u64> });
body!(Payload { kernel: String, cmdline: String, initramfs: Option<String> });
body!(Console { mode: String, socket: Option<String> });
body!(Rule { path: String, access: String });
body!(Disk { id: String, path: String, readonly: bool, serial: String, image_type: String });
body!(Net { id: String, mac: String, num_queues: usize });
body!(Fs { id: String, tag: String, socket: String, num_queues: u64, queue_size: u64 });
body!(Pmem { id: String, file: String, discard_writes: bool });
body!(Vsock { id: String, cid: u64, socket: String });
body!(Balloon { size: u64, deflate_on_oom: bool, free_page_reporting: bool });
body!(Rng { src: String });
body!(Resize { desired_vcpus: Option<u64>, desired_ram: Option<u64>, desired_balloon: Option<u64> });
body!(Passthrough { id: String, path: String });
body!(Remove { id: String });
body!(Destination { destination_url: String });
body!(Source { source_url: String, net_fds: Option<Vec<RestoredNet>> });
body!(RestoredNet { id: String, num_fds: usize });

type Done = Result<Option<Value>, &'static str>;

impl Fake {
    /// A connection to one without a VM.
    pub fn serve() -> UnixStream {
        Self::default().serve_itself()
    }

    /// A connection to an old one, which has no request `what`.
    pub fn serve_without(what: &'static str) -> UnixStream {
        Self { without: Some(what), ..Self::default() }.serve_itself()
    }

    fn serve_itself(mut self) -> UnixStream {
        http_server::serve(move |asked| match self.answer(asked) {
            Ok(None) => (StatusCode::NO_CONTENT, None),
            Ok(answer) => (StatusCode::OK, answer),
            Err(NOT_FOUND) => (StatusCode::NOT_FOUND, Some(json!([NOT_FOUND]))),
            Err(BAD_REQUEST) => (StatusCode::BAD_REQUEST, Some(json!([BAD_REQUEST]))),
            Err(cause) => (StatusCode::INTERNAL_SERVER_ERROR, Some(json!(["Error from API", cause]))),
        })
    }

    fn answer(&mut self, asked: Asked<'_>) -> Done {
        let Asked { method, path, body, descriptors } = asked;
        let came = descriptors.len();
        let what = path.strip_prefix("/api/v1/").ok_or(NOT_FOUND)?;
        if self.without == Some(what) {
            return Err(NOT_FOUND);
        }
        match (method.as_str(), what, body) {
            ("GET", "vmm.ping", None) => Ok(Some(json!({ "version": "v53.0", "pid": 1, "features": ["kvm"] }))),
            ("PUT", "vm.create", Some(body)) => self.create(read(body)?),
            ("PUT", "vm.boot", None) => self.change(&[Vm::Configured], "VM config is missing", Vm::Running),
            ("PUT", "vm.pause", None) => self.change(&[Vm::Running], "VM is not running", Vm::Paused),
            ("PUT", "vm.resume", None) => self.change(&[Vm::Paused], "invalid VM state transition", Vm::Running),
            ("PUT", "vm.power-button", None) => self.alive().map(|()| None),
            ("PUT", "vm.snapshot", Some(body)) => {
                let destination: Destination = read(body)?;
                (self.vm == Vm::Paused).then_some(()).ok_or("VM is not paused")?;
                url(&destination.destination_url).map(|()| None)
            }
            ("PUT", "vm.restore", Some(body)) => {
                let source: Source = read(body)?;
                url(&source.source_url)?;
                let wanted = source.net_fds.iter().flatten().map(|card| card.num_fds).sum::<usize>();
                (came == wanted).then_some(()).ok_or("bad request")?;
                self.change(&[Vm::None], "VM is already created", Vm::Paused)
            }
            ("PUT", "vm.resize", Some(body)) => self.resize(&read(body)?),
            ("PUT", "vm.add-disk", Some(body)) => read::<Disk>(body).and_then(|disk| self.add(disk.id, 5)),
            ("PUT", "vm.add-net", Some(body)) => self.add_net(read(body)?, came),
            ("PUT", "vm.add-pmem", Some(body)) => read::<Pmem>(body).and_then(|pmem| self.add(pmem.id, 7)),
            ("PUT", "vm.add-fs", Some(body)) => {
                let fs: Fs = read(body)?;
                self.shared_memory.then_some(()).ok_or(NOT_SHARED)?;
                self.add(fs.id, 8)
            }
            ("PUT", "vm.add-device", Some(body)) => {
                let device: Passthrough = read(body)?;
                device.path.starts_with("/sys/bus/pci/devices/").then_some(()).ok_or("invalid path")?;
                self.add(device.id, 9)
            }
            ("PUT", "vm.remove-device", Some(body)) => {
                let remove: Remove = read(body)?;
                if self.devices.remove(&remove.id) { Ok(None) } else { Err("unknown device id") }
            }
            ("GET", "vm.info", None) => self.info(),
            ("GET", "vm.counters", None) => self.alive().map(|()| Some(json!({ "root": { "read_bytes": 512 } }))),
            ("PUT" | "GET", known, _) if PUTS.contains(&known) => Err(BAD_REQUEST),
            _ => Err(NOT_FOUND),
        }
    }

    fn create(&mut self, config: Config) -> Done {
        if self.vm != Vm::None {
            return Err("VM is already created");
        }
        if config.cpus.max_vcpus < config.cpus.boot_vcpus {
            return Err("Max CPUs must be greater than or equal to boot CPUs");
        }
        // Where it has the launcher's standard streams, or no socket.
        if config.console.mode != "Off" || config.serial.mode != "Socket" || config.serial.socket.is_none() {
            return Err("Console mode combination is invalid");
        }
        if config.fs.as_ref().is_some_and(|list| !list.is_empty()) && !config.memory.shared {
            return Err(NOT_SHARED);
        }
        let disks = config.disks.iter().flatten().map(|disk| disk.id.clone());
        let fs = config.fs.iter().flatten().map(|fs| fs.id.clone());
        let pmem = config.pmem.iter().flatten().map(|pmem| pmem.id.clone());
        let vsock = config.vsock.iter().map(|vsock| vsock.id.clone());
        for id in disks.chain(fs).chain(pmem).chain(vsock) {
            self.devices.insert(id).then_some(()).ok_or("Identifier is not unique")?;
        }
        self.boot_vcpus = config.cpus.boot_vcpus as usize;
        self.max_vcpus = config.cpus.max_vcpus;
        self.memory = config.memory.size;
        self.balloon = config.balloon.map(|balloon| balloon.size);
        self.hotplug_memory = config.memory.hotplug_size.unwrap_or_default();
        self.shared_memory = config.memory.shared;
        self.landlock = config.landlock_enable;
        self.vm = Vm::Configured;
        Ok(None)
    }

    fn resize(&mut self, resize: &Resize) -> Done {
        self.alive()?;
        if resize.desired_vcpus.is_some_and(|vcpus| vcpus == 0 || vcpus > self.max_vcpus) {
            return Err("Desired vCPU count exceeds maximum");
        }
        let most = self.memory + self.hotplug_memory;
        if resize.desired_ram.is_some_and(|ram| !(self.memory..=most).contains(&ram)) {
            return Err("Invalid resize request");
        }
        if let Some(wanted) = resize.desired_ram {
            let before = std::mem::replace(&mut self.hotplugged, wanted - self.memory);
            (before != self.hotplugged).then_some(()).ok_or("new size and requested_size are identical")?;
        }
        if let Some(wanted) = resize.desired_balloon {
            *self.balloon.as_mut().ok_or("Missing balloon")? = wanted;
        }
        Ok(None)
    }

    fn info(&self) -> Done {
        let state = match self.vm {
            Vm::None => return Err("VM is not created"),
            Vm::Configured => "Created",
            Vm::Running => "Running",
            Vm::Paused => "Paused",
        };
        let memory = json!({
            "size": self.memory, "hotplug_size": self.hotplug_memory, "hotplugged_size": self.hotplugged,
        });
        let balloon = self.balloon.map(|size| json!({ "size": size }));
        let config = json!({ "memory": memory, "balloon": balloon, "landlock_enable": self.landlock });
        let has = self.memory - self.balloon.unwrap_or_default() + self.hotplugged;
        Ok(Some(json!({ "config": config, "state": state, "memory_actual_size": has })))
    }

    fn add_net(&mut self, net: Net, descriptors: usize) -> Done {
        // Without descriptors it would make a tap of its own.
        (net.num_queues == 2 * descriptors).then_some(()).ok_or("Number of queues to virtio_net does not match fds")?;
        (descriptors <= self.boot_vcpus).then_some(()).ok_or("Number of queues is larger than the number of vCPUs")?;
        self.add(net.id, 6)
    }

    /// Before the boot it is only noted down.
    fn add(&mut self, id: String, slot: u8) -> Done {
        if self.vm == Vm::None {
            return Err("VM is not created");
        }
        let answer = json!({ "id": id, "bdf": format!("0000:00:{slot:02x}.0") });
        self.devices.insert(id).then_some(()).ok_or("Identifier is not unique")?;
        Ok(Some(answer).filter(|_| self.vm != Vm::Configured))
    }

    /// It is not what it is already: unlike others, this one refuses a pause of what is paused.
    fn change(&mut self, from: &[Vm], otherwise: &'static str, to: Vm) -> Done {
        if !from.contains(&self.vm) {
            return Err(otherwise);
        }
        self.vm = to;
        Ok(None)
    }

    fn alive(&self) -> Result<(), &'static str> {
        match self.vm {
            Vm::None | Vm::Configured => Err("VM is not running"),
            Vm::Running | Vm::Paused => Ok(()),
        }
    }
}

const NOT_FOUND: &str = "Not Found";
const BAD_REQUEST: &str = "Bad Request";
/// Requests that are a `PUT`, with a body or without one, and nothing else.
const PUTS: &[&str] = &[
    "vm.create",
    "vm.boot",
    "vm.pause",
    "vm.resume",
    "vm.power-button",
    "vm.snapshot",
    "vm.restore",
    "vm.resize",
    "vm.add-disk",
    "vm.add-net",
    "vm.add-pmem",
    "vm.add-fs",
    "vm.add-device",
    "vm.remove-device",
];
const NOT_SHARED: &str = "Using vhost-user requires using shared memory or huge pages";

fn read<T: for<'a> Deserialize<'a>>(body: Value) -> Result<T, &'static str> {
    from_value(body).map_err(|error| {
        eprintln!("{error}");
        "invalid JSON"
    })
}

fn url(text: &str) -> Result<(), &'static str> {
    text.starts_with("file:///").then_some(()).ok_or("URL is not of a file")
}
