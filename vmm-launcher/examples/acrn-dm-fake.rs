//! Stands in for `acrn-dm` in tests: it parses its arguments as strictly as the real one does
//! (devicemodel/core/main.c, hw/pci/core.c) and plays a guest on its serial port.
//!
//! The guest does what `do=` on its command line says: `poweroff`, `panic`, `echo` a line, or nothing until it is ended.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, IsTerminal, Read, Write},
    os::unix::net::UnixListener,
    process::exit,
    thread,
};

use serde_json::{Value, json};

fn main() {
    let guest = parse(std::env::args().skip(1));
    let mut console = OpenOptions::new().read(true).write(true).open(&guest.console).unwrap_or_else(|_| {
        refuse(&format!("uart: open failed: {}", guest.console));
    });
    if !console.is_terminal() {
        refuse(&format!("uart: not a tty: {}", guest.console));
    }
    let listener = UnixListener::bind(&guest.monitor).unwrap_or_else(|_| refuse("init_socket failed"));
    let monitor = guest.monitor.clone();
    thread::spawn(move || serve_monitor(&listener, guest.disks));
    write!(console, "guest: up with {}\r\n", guest.bootargs).unwrap();
    let code = live(&guest.bootargs, &mut console);
    let _ = std::fs::remove_file(monitor);
    exit(code)
}

/// The exit code.
fn live(bootargs: &str, console: &mut File) -> i32 {
    let what = bootargs.split(' ').find_map(|word| word.strip_prefix("do=")).unwrap_or_default();
    match what {
        "poweroff" => 0,
        "panic" => {
            write!(console, "Kernel panic - not syncing: no init found\r\n").unwrap();
            0
        }
        "echo" => {
            let mut line = String::new();
            BufReader::new(console.try_clone().unwrap()).read_line(&mut line).unwrap();
            write!(console, "guest: heard {}\r\n", line.trim()).unwrap();
            0
        }
        "crash" => {
            println!("vm_run: failed to run the guest");
            1
        }
        _ => loop {
            thread::park();
        },
    }
}

struct Guest {
    console: String,
    monitor: String,
    bootargs: String,
    /// What each slot's disk holds.
    disks: HashMap<u32, Option<String>>,
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Guest {
    let mut guest =
        Guest { console: String::new(), monitor: String::new(), bootargs: String::new(), disks: HashMap::new() };
    let mut slots = HashMap::new();
    let mut configured = Vec::new();
    let mut name = None;
    while let Some(flag) = arguments.next() {
        if flag == "-v" {
            println!("DM: 3.3-2024-10-15 16:00:00 (tag: acrn-2024w42) build by nobody@2024-10-16");
            exit(0);
        }
        if !flag.starts_with('-') {
            if name.replace(flag).is_some() {
                refuse("You must provide the name of the Virtual Machine (VM) you want to start. Exiting.");
            }
            continue;
        }
        let mut value = || arguments.next().unwrap_or_else(|| usage(&flag));
        match flag.as_str() {
            "-A" | "--virtio_msi" | "--windows" => {}
            "-m" => memory(&value()),
            "-k" => file("kernel", &value()),
            "-r" => file("ramdisk", &value()),
            "--iasl" => file("iasl", &value()),
            "-B" => guest.bootargs = bootargs(value()),
            "-l" => guest.console = uart(&value()),
            "-s" => configured.push(slot(&value(), &mut slots)),
            "--cmd_monitor" => guest.monitor = value(),
            "--cpu_affinity" => affinity(&value()),
            _ => usage(&flag),
        }
    }
    let name = name.unwrap_or_else(|| refuse("You must provide the name of the Virtual Machine (VM)"));
    if name.len() >= 16 {
        refuse("The name of the VM exceeds the maximum length: 15");
    }
    for needed in ["hostbridge", "lpc"] {
        if !slots.values().any(|device| device == needed) {
            refuse(&format!("there is no {needed}"));
        }
    }
    for device in configured {
        init(&device, &mut guest.disks);
    }
    guest
}

fn memory(text: &str) {
    let mib = text.strip_suffix(['M', 'm']).and_then(|digits| digits.parse::<u64>().ok());
    if mib.is_none_or(|mib| mib < 128) {
        refuse(&format!("invalid memsize '{text}'"));
    }
}

fn file(what: &str, path: &str) {
    if path.len() >= 1024 || File::open(path).is_err() {
        refuse(&format!("Could not open {what} {path}"));
    }
}

fn bootargs(text: String) -> String {
    if text.len() >= 1024 {
        refuse(&format!("invalid bootargs: {} bytes", text.len()));
    }
    text
}

fn uart(text: &str) -> String {
    match text.split_once(',') {
        Some((unit, path)) if ["com1", "com2"].contains(&unit) => path.to_owned(),
        _ => refuse(&format!("invalid lpc device configuration '{text}'")),
    }
}

fn affinity(text: &str) {
    if text.split(',').any(|id| id.parse::<u32>().is_err()) {
        refuse(&format!("invalid pcpu param {text}"));
    }
}

/// A device in its slot, whose configuration is looked at only when the guest is made.
struct Slot {
    number: u32,
    device: String,
    config: Option<String>,
}

fn slot(text: &str, slots: &mut HashMap<u32, String>) -> Slot {
    let mut words = text.splitn(3, ',');
    let (place, device, config) = (words.next().unwrap_or_default(), words.next(), words.next());
    let number = place.split(':').next().and_then(|number| number.parse::<u32>().ok());
    let (Some(number @ 0..32), Some(device)) = (number, device) else {
        refuse(&format!("Invalid PCI slot info field \"{text}\""));
    };
    if slots.insert(number, device.to_owned()).is_some() {
        refuse(&format!("pci slot {number}:0 already occupied!"));
    }
    if !["hostbridge", "lpc", "virtio-rnd", "virtio-blk", "virtio-net", "vhost-vsock"].contains(&device) {
        refuse(&format!("pci slot {number}:0: unknown device \"{device}\""));
    }
    Slot { number, device: device.to_owned(), config: config.map(str::to_owned) }
}

fn init(slot: &Slot, disks: &mut HashMap<u32, Option<String>>) {
    match (slot.device.as_str(), slot.config.as_deref()) {
        ("hostbridge" | "lpc" | "virtio-rnd", _) => {}
        ("virtio-blk", Some("nodisk")) => drop(disks.insert(slot.number, None)),
        ("virtio-blk", Some(image)) => {
            disk(image).unwrap_or_else(|error| refuse(&error));
            disks.insert(slot.number, Some(image.to_owned()));
        }
        ("virtio-net", Some(config)) if config.starts_with("tap=") => {}
        ("vhost-vsock", Some(config)) if config.starts_with("cid=") => {}
        (device, _) => refuse(&format!("pci {device} init failed")),
    }
}

fn disk(text: &str) -> Result<(), String> {
    let mut words = text.split(',');
    let path = words.next().unwrap_or_default();
    if let Some(unknown) = words.find(|word| !["ro", "writeback", "writethru", "nocache"].contains(word)) {
        return Err(format!("Invalid device option \"{unknown}\""));
    }
    File::open(path).map(drop).map_err(|_| format!("Could not open backing file: {path}"))
}

fn serve_monitor(listener: &UnixListener, mut disks: HashMap<u32, Option<String>>) {
    for connection in listener.incoming() {
        let mut connection = connection.unwrap();
        let mut message = vec![0; 4096];
        let count = connection.read(&mut message).unwrap();
        let Ok(request) = serde_json::from_slice::<Value>(&message[..count]) else { continue };
        // What it does not know it does not answer either.
        if request["command"] == "blkrescan" {
            let filled = fill(request["arguments"].as_str().unwrap_or_default(), &mut disks);
            let ack = json!({ "ack": if filled { 0 } else { -1 } });
            // In one piece, as the real one does.
            connection.write_all(format!("{ack:#}").as_bytes()).unwrap();
        }
    }
}

fn fill(arguments: &str, disks: &mut HashMap<u32, Option<String>>) -> bool {
    let Some((slot, image)) = arguments.split_once(',') else { return false };
    let Some(place) = slot.parse().ok().and_then(|slot: u32| disks.get_mut(&slot)) else { return false };
    place.is_none() && disk(image).is_ok() && place.replace(image.to_owned()).is_none()
}

fn usage(flag: &str) -> ! {
    refuse(&format!("acrn-dm: unrecognized option '{flag}'\nUsage: acrn-dm [-hAYv] …"))
}

/// On standard output, as the real one does.
fn refuse(words: &str) -> ! {
    println!("{words}");
    exit(1)
}
