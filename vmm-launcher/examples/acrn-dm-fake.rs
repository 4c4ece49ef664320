//! Stands in for `acrn-dm` in tests: it looks at its arguments in the order and as strictly as the real one does
//! (devicemodel/core/main.c, hw/pci/core.c) and plays a guest on its serial port.
//!
//! The guest does what `do=` on its command line says: `poweroff`, `reboot`, `panic`, `crash` its hypervisor, `echo` a line, or
//! nothing until it is ended. With `hang` there is none: acrn-dm waits for its VM. With `mute` the first disk is filled without
//! a word.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, IsTerminal, Read, Write},
    os::unix::{fs::FileTypeExt, net::UnixListener},
    process::{Command, Stdio, exit},
    thread,
};

use serde_json::{Value, json};

/// `CLIENT_BUF_LEN`: longer messages are dropped.
const MAX_MESSAGE: usize = 4096;
/// `CMD_ARG_MAX` without its terminating zero: longer arguments are cut off.
const MAX_ARGUMENTS: usize = 319;
const SECTOR: u64 = 512;

fn main() {
    let guest = parse(std::env::args().skip(1));
    if guest.does("hang") {
        stay();
    }
    // What is in its place it takes away.
    let _ = fs::remove_file(&guest.monitor);
    let listener = UnixListener::bind(&guest.monitor).unwrap_or_else(|_| refuse("Unable to init vdev"));
    let code = run(&guest, listener);
    let _ = fs::remove_file(&guest.monitor);
    exit(code.unwrap_or_else(|words| refuse(&words)))
}

/// The exit code.
fn run(guest: &Guest, listener: UnixListener) -> Result<i32, String> {
    let mut disks = HashMap::new();
    for (number, device) in &guest.devices {
        init(*number, device, &mut disks)?;
    }
    let console = OpenOptions::new().read(true).write(true).open(&guest.console);
    let mut console = console.map_err(|_| format!("uart: open failed: {}", guest.console))?;
    if !console.is_terminal() {
        return Err(format!("uart: not a tty: {}", guest.console));
    }
    let mute = guest.does("mute");
    thread::spawn(move || serve_monitor(&listener, disks, mute));
    write!(console, "guest: up with {}\r\n", guest.bootargs).unwrap();
    Ok(live(guest, &mut console))
}

/// The exit code.
fn live(guest: &Guest, console: &mut File) -> i32 {
    match guest.what() {
        "poweroff" => 0,
        "reboot" => restart(guest),
        "panic" => {
            write!(console, "Kernel panic - not syncing: no init found\r\n").unwrap();
            restart(guest)
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
        _ => stay(),
    }
}

/// The hypervisor makes a triple fault a power-off (hypervisor/arch/x86/guest/vm_reset.c). After Linux's other ways acrn-dm
/// makes its VM anew, and so on.
fn restart(guest: &Guest) -> i32 {
    if guest.bootargs.split(' ').any(|word| word == "reboot=t") { 0 } else { stay() }
}

/// Until it is ended.
fn stay() -> ! {
    loop {
        thread::park();
    }
}

#[derive(Default)]
struct Guest {
    console: String,
    monitor: String,
    bootargs: String,
    /// By their slots.
    devices: BTreeMap<u32, Device>,
}

impl Guest {
    fn what(&self) -> &str {
        self.bootargs.split(' ').find_map(|word| word.strip_prefix("do=")).unwrap_or_default()
    }

    fn does(&self, what: &str) -> bool {
        self.what() == what
    }
}

/// Its configuration is looked at only when the guest is made.
struct Device {
    kind: String,
    config: Option<String>,
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Guest {
    let mut guest = Guest::default();
    let mut iasl = String::new();
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
            "-k" | "-r" => image(&value()),
            "--iasl" => iasl = value(),
            "-B" => guest.bootargs = bootargs(value()),
            "-l" => guest.console = uart(&value()),
            "-s" => slot(&value(), &mut guest.devices),
            "--cmd_monitor" => guest.monitor = value(),
            "--cpu_affinity" => affinity(&value()),
            _ => usage(&flag),
        }
    }
    if !is_iasl(&iasl) {
        refuse("Please install iasl tool with version >= 20190703 from https://www.acpica.org/downloads");
    }
    let name = name.unwrap_or_else(|| refuse("You must provide the name of the Virtual Machine (VM)"));
    if name.len() >= 16 {
        refuse("The name of the VM exceeds the maximum length: 15");
    }
    for needed in ["hostbridge", "lpc"] {
        if !guest.devices.values().any(|device| device.kind == needed) {
            refuse(&format!("there is no {needed}"));
        }
    }
    guest
}

fn memory(text: &str) {
    let mib = text.strip_suffix(['M', 'm']).and_then(|digits| digits.parse::<u64>().ok());
    if mib.is_none_or(|mib| mib < 128) {
        refuse(&format!("invalid memsize '{text}'"));
    }
}

fn image(path: &str) {
    if path.len() >= 1024 || File::open(path).and_then(|file| file.metadata()).map_or(0, |file| file.len()) == 0 {
        refuse(&format!("SW_LOAD: check_image failed for '{path}'"));
    }
}

/// As `check_iasl_version` of hw/platform/acpi/acpi.c has it.
fn is_iasl(path: &str) -> bool {
    let output = Command::new("/bin/sh").args(["-c", &format!("{path} -v")]).stderr(Stdio::null()).output().unwrap();
    let words = String::from_utf8_lossy(&output.stdout);
    let version = words.lines().find_map(|line| line.strip_prefix("ASL+ Optimizing Compiler/Disassembler version "));
    version.and_then(|version| version.parse().ok()).is_some_and(|version: u32| version >= 20_190_703)
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

fn slot(text: &str, devices: &mut BTreeMap<u32, Device>) {
    let mut words = text.splitn(3, ',');
    let (place, kind, config) = (words.next().unwrap_or_default(), words.next(), words.next());
    let number = place.split(':').next().and_then(|number| number.parse::<u32>().ok());
    let (Some(number @ 0..32), Some(kind)) = (number, kind) else {
        refuse(&format!("Invalid PCI slot info field \"{text}\""));
    };
    let device = Device { kind: kind.to_owned(), config: config.map(str::to_owned) };
    if devices.insert(number, device).is_some() {
        refuse(&format!("pci slot {number}:0 already occupied!"));
    }
    if !["hostbridge", "lpc", "virtio-rnd", "virtio-blk", "virtio-net", "vhost-vsock"].contains(&kind) {
        refuse(&format!("pci slot {number}:0: unknown device \"{kind}\""));
    }
}

/// `disks` has what each slot's holds.
fn init(number: u32, device: &Device, disks: &mut HashMap<u32, Option<String>>) -> Result<(), String> {
    match (device.kind.as_str(), device.config.as_deref()) {
        ("hostbridge" | "lpc" | "virtio-rnd", _) => Ok(()),
        ("virtio-blk", Some(image)) => {
            let held = if is_none(image) { None } else { Some(image.to_owned()) };
            held.as_deref().map_or(Ok(()), disk)?;
            disks.insert(number, held);
            Ok(())
        }
        ("virtio-net", Some(config)) => card(config),
        ("vhost-vsock", Some(config)) => {
            let cid = config.strip_prefix("cid=").and_then(|cid| cid.parse().ok());
            let valid = cid.is_some_and(|cid| (3..u32::MAX).contains(&cid));
            if valid { Ok(()) } else { Err("vsock: guest_cid has to be 0x2~0xffffffff.".into()) }
        }
        (kind, _) => Err(format!("pci {kind} init failed")),
    }
}

/// The word is looked for in all of it, path or not.
fn is_none(image: &str) -> bool {
    image.contains("nodisk")
}

fn disk(text: &str) -> Result<(), String> {
    let mut words = text.split(',');
    let path = words.next().unwrap_or_default();
    if let Some(unknown) = words.find(|word| !["ro", "writeback", "writethru", "nocache"].contains(word)) {
        return Err(format!("Invalid device option \"{unknown}\""));
    }
    let file = File::open(path).and_then(|file| file.metadata());
    let file = file.map_err(|_| format!("Could not open backing file: {path}"))?;
    if !file.file_type().is_block_device() && (file.len() < SECTOR || file.len() % SECTOR != 0) {
        return Err(format!("{path} size not corret, should be multiple of {SECTOR}"));
    }
    Ok(())
}

/// It does not need the interface: without one the guest's card has no link.
fn card(config: &str) -> Result<(), String> {
    let mut words = config.split(',');
    if words.next().and_then(|word| word.strip_prefix("tap=")).is_none_or(str::is_empty) {
        return Err("virtio_net: invalid optional argument".into());
    }
    match words.find_map(|word| word.strip_prefix("mac=")) {
        Some(mac) if !is_one_cards(mac) => Err(format!("Invalid MAC {mac}")),
        _ => Ok(()),
    }
}

fn is_one_cards(mac: &str) -> bool {
    let octets: Result<Vec<_>, _> = mac.split(':').map(|octet| u8::from_str_radix(octet, 16)).collect();
    octets.is_ok_and(|octets| octets.len() == 6 && octets[0] & 1 == 0 && octets != [0; 6])
}

fn serve_monitor(listener: &UnixListener, mut disks: HashMap<u32, Option<String>>, mut mute: bool) {
    for connection in listener.incoming() {
        let mut connection = connection.unwrap();
        let mut message = vec![0; MAX_MESSAGE];
        let count = connection.read(&mut message).unwrap();
        let Ok(request) = serde_json::from_slice::<Value>(&message[..count]) else { continue };
        // What it does not know it does not answer either.
        if count == MAX_MESSAGE || request["command"] != "blkrescan" {
            continue;
        }
        let mut arguments = request["arguments"].as_str().unwrap_or_default().as_bytes().to_vec();
        arguments.truncate(MAX_ARGUMENTS);
        let filled = fill(&String::from_utf8_lossy(&arguments), &mut disks);
        if std::mem::take(&mut mute) {
            continue;
        }
        let ack = json!({ "ack": if filled { 0 } else { -1 } });
        // In one piece, as the real one does.
        connection.write_all(format!("{ack:#}").as_bytes()).unwrap();
    }
}

fn fill(arguments: &str, disks: &mut HashMap<u32, Option<String>>) -> bool {
    let Some((slot, image)) = arguments.split_once(',') else { return false };
    let Some(place) = slot.parse().ok().and_then(|slot: u32| disks.get_mut(&slot)) else { return false };
    place.is_none() && !is_none(image) && disk(image).is_ok() && place.replace(image.to_owned()).is_none()
}

fn usage(flag: &str) -> ! {
    refuse(&format!("acrn-dm: unrecognized option '{flag}'\nUsage: acrn-dm [-hAYv] …"))
}

/// On standard output, as the real one does.
fn refuse(words: &str) -> ! {
    println!("{words}");
    exit(1)
}
