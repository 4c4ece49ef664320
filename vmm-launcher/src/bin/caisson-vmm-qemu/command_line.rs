//! QEMU's command line: arguments, and the descriptors that they name by number.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use caisson_protocol::vmm::{Balloon, Block, Net, Pmem, VmConfig, device::Kind};
use caisson_vmm_launcher::{
    Error, Result,
    guest_vsock::{GuestVsock, VsockServer},
    huge_pages::SIZE_MIB,
};

use crate::{
    accelerator::Accelerator,
    card::Card,
    hotplug,
    options::{MachineType, Options},
    saved::Saved,
    sizes::{self, room_mib},
};

/// q35 without what a guest under `virtio` never looks at; each would cost time at boot.
const Q35: &str = "q35,smm=off,sata=off,smbus=off,i8042=off,hpet=off,vmport=off,graphics=off,usb=off";
/// microvm with ACPI, by which the guest finds its devices and powers itself off, and with a firmware that loads the
/// kernel without option ROMs.
const MICROVM: &str = "microvm,acpi=on,pcie=off,rtc=on,isa-serial=on,x-option-roms=off,auto-kernel-cmdline=off";
/// In QEMU's data directory.
const MICROVM_FIRMWARE: &str = "qboot.rom";

/// Everything that TCG emulates except a fifth level of page tables: a walk of one less makes booting 5 % quicker.
const TCG_CPU: &str = "max,la57=off";

/// Linux maps persistent memory in huge pages, in bytes.
const PMEM_BLOCK: u64 = 2 << 20;

/// A device that is memory to the guest has its place at a multiple of this, in MiB.
const PLACE_MIB: u64 = 1024;

/// QEMU's end of a connection to the launcher.
#[derive(Debug)]
pub enum Socket {
    /// For as long as this launcher runs.
    Connected(OwnedFd),
    /// For one launcher after the other; the first waits in it.
    Listening(OwnedFd),
}

/// Grows until QEMU is started.
#[derive(Debug)]
pub struct CommandLine {
    machine_type: MachineType,
    /// Options of what memory comes from, where that is not simply QEMU's own.
    memory_file: Option<String>,
    pub arguments: Vec<String>,
    pub descriptors: Vec<OwnedFd>,
}

impl CommandLine {
    /// A machine without devices that waits before its first instruction.
    pub fn new(vm: &VmConfig, options: &Options, accelerator: Accelerator, shared_memory: bool) -> Self {
        let memory_file = memory_file(shared_memory, vm.huge_pages);
        let mut line =
            Self { machine_type: options.machine_type, memory_file, arguments: Vec::new(), descriptors: Vec::new() };
        let mut machine = match options.machine_type {
            MachineType::Microvm => MICROVM.to_owned(),
            MachineType::Q35 => Q35.to_owned(),
        };
        line.flags(&["-no-user-config", "-nodefaults", "-no-reboot", "-S"]);
        line.push("-display", "none");
        line.push("-action", "panic=exit-failure");
        line.push("-sandbox", &options.seccomp_sandbox);
        if let Some(file) = line.memory_file.clone() {
            machine.push_str(",memory-backend=memory");
            line.push("-object", format!("memory-backend-memfd,id=memory,size={}M,{file}", vm.memory_mib));
        }
        line.push("-machine", machine);
        if options.machine_type == MachineType::Microvm {
            line.push("-bios", MICROVM_FIRMWARE);
            line.push("-global", "virtio-mmio.force-legacy=false");
        }
        if options.machine_type == MachineType::Q35 {
            for slot in 0..options.hotplug_slots {
                let (bus, chassis, address) = (hotplug::bus(slot), slot + 1, root_port(slot));
                line.push(
                    "-device",
                    format!("pcie-root-port,id={bus},chassis={chassis},slot={slot},addr={address},multifunction=on"),
                );
            }
        }
        let (accel, mut cpu) = match accelerator {
            Accelerator::Kvm => ("kvm", "host".to_owned()),
            Accelerator::Tcg => ("tcg,thread=multi", TCG_CPU.to_owned()),
        };
        for feature in options.cpu_features.split(',').map(str::trim).filter(|feature| !feature.is_empty()) {
            cpu.push_str(&format!(",{feature}"));
        }
        line.push("-accel", accel);
        line.push("-cpu", cpu);
        match options.machine_type {
            MachineType::Microvm => {
                line.push("-m", format!("{}M", vm.memory_mib));
                line.push("-smp", vm.vcpus.to_string());
            }
            MachineType::Q35 => {
                let room_mib = room_mib(vm.memory_mib, vm.max_memory_mib);
                let most = match place_mib(room_mib) + pmem_places_mib(vm) {
                    0 => String::new(),
                    place_mib => format!(",maxmem={}M", vm.memory_mib + place_mib),
                };
                line.push("-m", format!("{}M{most}", vm.memory_mib));
                let most = if vm.max_vcpus > vm.vcpus { format!(",maxcpus={}", vm.max_vcpus) } else { String::new() };
                line.push("-smp", format!("{}{most}", vm.vcpus));
                line.more_memory(room_mib, vm.huge_pages);
            }
        }
        line
    }

    /// What the guest boots.
    pub fn kernel(&mut self, vm: &VmConfig, params: String) {
        self.push("-kernel", &vm.kernel);
        if !vm.initrd.is_empty() {
            self.push("-initrd", &vm.initrd);
        }
        self.push("-append", params);
    }

    /// The machine protocol.
    pub fn monitor(&mut self, socket: Socket) {
        self.socket("qmp", socket);
        self.push("-mon", "chardev=qmp,mode=control");
    }

    /// The first serial port.
    pub fn console(&mut self, socket: Socket) {
        self.socket("console", socket);
        self.push("-serial", "chardev:console");
    }

    fn socket(&mut self, id: &str, socket: Socket) {
        let (fd, how) = match socket {
            Socket::Connected(fd) => (fd, ""),
            // It takes one connection after the other, and does not wait for the first.
            Socket::Listening(fd) => (fd, ",server=on,wait=off"),
        };
        let fd = self.inherit(fd);
        self.push("-chardev", format!("socket,id={id},fd={fd}{how}"));
    }

    pub fn block(&mut self, id: &str, block: &Block) {
        let read_only = if block.read_only { "on" } else { "off" };
        let driver = block_driver(&block.path);
        let file = escape(&block.path);
        self.push(
            "-blockdev",
            format!("driver=raw,node-name=disk-{id},read-only={read_only},file.driver={driver},file.filename={file}"),
        );
        // An error is the guest's to handle: by default QEMU stops the VM where the host has no space left.
        self.device("virtio-blk", id, &format!("drive=disk-{id},serial={id},werror=report,rerror=report"));
    }

    pub fn net(&mut self, id: &str, net: &Net, card: Card) {
        let several = if card.taps.len() > 1 { ",mq=on" } else { "" };
        let vhost = if card.vhosts.is_empty() { "" } else { ",vhost=on,vhostfds=" };
        let (taps, vhosts) = (self.inherit_all(card.taps), self.inherit_all(card.vhosts));
        self.push("-netdev", format!("tap,id=net-{id},fds={taps}{vhost}{vhosts}"));
        self.device("virtio-net", id, &format!("netdev=net-{id},mac={}{several}{}", net.mac, self.no_rom()));
    }

    /// `connection` leads to virtiofsd.
    pub fn fs(&mut self, id: &str, tag: &str, connection: OwnedFd) {
        let fd = self.inherit(connection);
        self.push("-chardev", format!("socket,id=fs-{id},fd={fd}"));
        self.device("vhost-user-fs", id, &format!("chardev=fs-{id},tag={tag}"));
    }

    /// Answers with what must live as long as QEMU.
    pub fn vsock(&mut self, id: &str, vsock: GuestVsock) -> Option<VsockServer> {
        match vsock {
            GuestVsock::Kernel { vhost, cid } => {
                let fd = self.inherit(vhost);
                self.device("vhost-vsock", id, &format!("guest-cid={cid},vhostfd={fd}"));
                None
            }
            GuestVsock::Hybrid { server, connection } => {
                let fd = self.inherit(connection);
                self.push("-chardev", format!("socket,id=vsock-{id},fd={fd}"));
                self.device("vhost-user-vsock", id, &format!("chardev=vsock-{id}"));
                Some(server)
            }
        }
    }

    /// A device that holds up to `room_mib` of memory, and nothing yet.
    fn more_memory(&mut self, room_mib: u64, huge_pages: bool) {
        if room_mib == 0 {
            return;
        }
        let (id, block_mib) = (sizes::MEMORY_ID, sizes::MEMORY_BLOCK_MIB);
        let backend = self.memory_file.as_ref().map_or_else(|| "ram".to_owned(), |file| format!("memfd,{file}"));
        self.push("-object", format!("memory-backend-{backend},id=memory-{id},size={room_mib}M,reserve=off"));
        // Huge pages that are not there when the guest touches its memory would end QEMU.
        let prealloc = if huge_pages { ",prealloc=on" } else { "" };
        self.push(
            "-device",
            format!("virtio-mem-pci,id={id},memdev=memory-{id},requested-size=0,block-size={block_mib}M{prealloc}"),
        );
    }

    /// What the guest writes to a file that is `read_only` stays in memory of its own.
    ///
    /// # Errors
    /// When the machine has no place for it, or Linux would not take it.
    pub fn pmem(&mut self, id: &str, pmem: &Pmem) -> Result<()> {
        if self.machine_type == MachineType::Microvm {
            return Err(Error::Unsupported(
                "QEMU's microvm has no place for pmem images; machine_type = \"q35\" has".into(),
            ));
        }
        let bytes = std::fs::metadata(&pmem.path).map_or(0, |metadata| metadata.len());
        if bytes == 0 || !bytes.is_multiple_of(PMEM_BLOCK) {
            return Err(Error::Invalid(format!(
                "the pmem image {} has {bytes} bytes, which is not a multiple of 2 MiB; `truncate -s {}M` makes it one",
                pmem.path,
                bytes.max(1).next_multiple_of(PMEM_BLOCK) >> 20
            )));
        }
        let (share, path) = (if pmem.read_only { "off" } else { "on" }, escape(&pmem.path));
        self.push("-object", format!("memory-backend-file,id=pmem-{id},mem-path={path},size={bytes},share={share}"));
        self.push("-device", format!("virtio-pmem-pci,id={id},memdev=pmem-{id}"));
        Ok(())
    }

    /// Instead of a boot. Answers what the VM is to be read from.
    pub fn incoming(&mut self, saved: Saved) -> String {
        self.push("-incoming", "defer");
        format!("fd:{}", self.inherit(saved.into_fd()))
    }

    /// `host` is a PCI address of the host.
    ///
    /// # Errors
    /// When the machine has no PCI.
    pub fn vfio(&mut self, id: &str, host: &str) -> Result<()> {
        if self.machine_type == MachineType::Microvm {
            return Err(Error::Unsupported(
                "QEMU's microvm has no PCI for devices of the host; machine_type = \"q35\" has".into(),
            ));
        }
        self.push("-device", format!("vfio-pci,id={id},host={host}"));
        Ok(())
    }

    pub fn rng(&mut self, id: &str, source: &str) {
        self.push("-object", format!("rng-random,id=rng-{id},filename={}", escape(source)));
        self.device("virtio-rng", id, &format!("rng=rng-{id}"));
    }

    pub fn balloon(&mut self, id: &str, balloon: &Balloon) {
        let reporting = if balloon.free_page_reporting { "on" } else { "off" };
        self.device("virtio-balloon", id, &format!("deflate-on-oom=on,free-page-reporting={reporting}"));
    }

    fn device(&mut self, driver: &str, id: &str, properties: &str) {
        let driver = self.machine_type.driver(driver);
        self.push("-device", format!("{driver},id={id},{properties}"));
    }

    /// A network card on PCI would bring a boot ROM.
    fn no_rom(&self) -> &'static str {
        match self.machine_type {
            MachineType::Microvm => "",
            MachineType::Q35 => ",romfile=",
        }
    }

    fn push(&mut self, flag: &str, value: impl Into<String>) {
        self.arguments.extend([flag.to_owned(), value.into()]);
    }

    fn flags(&mut self, flags: &[&str]) {
        self.arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
    }

    /// Their numbers, as an argument lists them.
    fn inherit_all(&mut self, fds: Vec<OwnedFd>) -> String {
        fds.into_iter().map(|fd| self.inherit(fd).to_string()).collect::<Vec<_>>().join(":")
    }

    fn inherit(&mut self, fd: OwnedFd) -> RawFd {
        let number = fd.as_raw_fd();
        self.descriptors.push(fd);
        number
    }
}

/// A vhost-user backend is another process that reads and writes the guest's memory; huge pages come as a file too.
fn memory_file(shared: bool, huge_pages: bool) -> Option<String> {
    let pages = if huge_pages { format!(",hugetlb=on,hugetlbsize={SIZE_MIB}M") } else { String::new() };
    (shared || huge_pages).then(|| format!("share=on{pages}"))
}

/// In MiB: what q35 keeps room for above the guest's first memory. It costs nothing until it is used.
fn place_mib(room_mib: u64) -> u64 {
    if room_mib > 0 { room_mib.next_multiple_of(PLACE_MIB) + PLACE_MIB } else { 0 }
}

/// In MiB: where `vm`'s pmem images are.
fn pmem_places_mib(vm: &VmConfig) -> u64 {
    let images = vm.devices.iter().filter_map(|device| match &device.kind {
        Some(Kind::Pmem(pmem)) => Some(std::fs::metadata(&pmem.path).map_or(0, |metadata| metadata.len())),
        _ => None,
    });
    images.map(|bytes| place_mib(bytes >> 20)).sum()
}

/// Where the slot's root port is: each of the places behind the host bridge has room for eight.
fn root_port(slot: u8) -> String {
    format!("{:#x}.{}", 1 + slot / 8, slot % 8)
}

/// A comma in a value is written twice, `qemu(1)`.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// QEMU's name for what `path` is.
pub fn block_driver(path: &str) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    let is_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    if is_device { "host_device" } else { "file" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(machine_type: MachineType) -> CommandLine {
        let options = Options { machine_type, cpu_features: " -avx, +svm".into(), ..Default::default() };
        let vm = VmConfig { vcpus: 2, memory_mib: 128, ..Default::default() };
        CommandLine::new(&vm, &options, Accelerator::Tcg, true)
    }

    fn value<'a>(line: &'a CommandLine, flag: &str) -> &'a str {
        let at = line.arguments.iter().position(|argument| argument == flag).unwrap();
        &line.arguments[at + 1]
    }

    #[test]
    fn features_are_added_to_the_processor() {
        assert_eq!(value(&line(MachineType::Q35), "-cpu"), "max,la57=off,-avx,+svm");
    }

    #[test]
    fn shared_memory_is_the_machines_memory() {
        let line = line(MachineType::Microvm);
        assert_eq!(value(&line, "-object"), "memory-backend-memfd,id=memory,size=128M,share=on");
        assert!(value(&line, "-machine").ends_with(",memory-backend=memory"));
    }

    #[test]
    fn huge_pages_are_the_machines_memory_too() {
        let vm = VmConfig { vcpus: 1, memory_mib: 128, huge_pages: true, ..Default::default() };
        let line = CommandLine::new(&vm, &Options::default(), Accelerator::Tcg, false);
        assert!(value(&line, "-object").ends_with(",size=128M,share=on,hugetlb=on,hugetlbsize=2M"));
        assert!(value(&line, "-machine").ends_with(",memory-backend=memory"));
    }

    #[test]
    fn memory_that_comes_later_is_of_huge_pages_too() {
        let vm = VmConfig { vcpus: 1, memory_mib: 128, max_memory_mib: 256, huge_pages: true, ..Default::default() };
        let options = Options { machine_type: MachineType::Q35, ..Default::default() };
        let line = CommandLine::new(&vm, &options, Accelerator::Tcg, false).arguments.join(" ");
        let pages = "share=on,hugetlb=on,hugetlbsize=2M";
        let backend = format!("memory-backend-memfd,{pages},id=memory-more-memory,size=128M,reserve=off ");
        assert!(line.contains(&backend), "{line}");
        assert!(line.ends_with("requested-size=0,block-size=2M,prealloc=on"), "{line}");
    }

    #[test]
    fn slots_share_places_eight_by_eight() {
        let options = Options { machine_type: MachineType::Q35, hotplug_slots: 9, ..Default::default() };
        let line = CommandLine::new(&VmConfig::default(), &options, Accelerator::Tcg, false).arguments.join(" ");
        assert!(line.contains("id=slot-0,chassis=1,slot=0,addr=0x1.0,multifunction=on "), "{line}");
        assert!(line.contains("id=slot-7,chassis=8,slot=7,addr=0x1.7,multifunction=on "), "{line}");
        assert!(line.contains("id=slot-8,chassis=9,slot=8,addr=0x2.0,multifunction=on "), "{line}");
    }

    #[test]
    fn a_disks_errors_are_the_guests() {
        let mut line = line(MachineType::Microvm);
        line.block("data", &Block::default());
        assert!(line.arguments.last().unwrap().ends_with(",werror=report,rerror=report"));
    }

    #[test]
    fn a_path_cannot_add_properties() {
        let mut line = line(MachineType::Q35);
        line.block("root", &Block { path: "/a,read-only=off".into(), read_only: true, ..Default::default() });
        assert!(value(&line, "-blockdev").ends_with("read-only=on,file.driver=file,file.filename=/a,,read-only=off"));
    }

    fn card(queues: usize, with_vhost: bool) -> Card {
        let files = |count| (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        Card { taps: files(queues), vhosts: files(if with_vhost { queues } else { 0 }) }
    }

    #[test]
    fn a_card_is_on_descriptors_that_qemu_inherits() {
        let net = Net { tap: "tap0".into(), mac: "02:00:00:00:00:01".into(), ..Default::default() };
        let mut line = line(MachineType::Microvm);
        line.net("net", &net, card(2, true));
        let [a, b, c, d] = [0, 1, 2, 3].map(|at| line.descriptors[at].as_raw_fd());
        assert_eq!(value(&line, "-netdev"), format!("tap,id=net-net,fds={a}:{b},vhost=on,vhostfds={c}:{d}"));
        let device = "virtio-net-device,id=net,netdev=net-net,mac=02:00:00:00:00:01,mq=on";
        assert_eq!(line.arguments.last().unwrap(), device);
    }

    #[test]
    fn a_card_does_without_vhost_where_there_is_none() {
        let mut line = line(MachineType::Microvm);
        line.net("net", &Net::default(), card(1, false));
        let fd = line.descriptors[0].as_raw_fd();
        assert_eq!(value(&line, "-netdev"), format!("tap,id=net-net,fds={fd}"));
    }

    #[test]
    fn a_device_is_on_the_machines_bus() {
        let (mut microvm, mut q35) = (line(MachineType::Microvm), line(MachineType::Q35));
        microvm.rng("rng", "/dev/urandom");
        q35.rng("rng", "/dev/urandom");
        assert_eq!(microvm.arguments.last().unwrap(), "virtio-rng-device,id=rng,rng=rng-rng");
        assert_eq!(q35.arguments.last().unwrap(), "virtio-rng-pci,id=rng,rng=rng-rng");
    }
}
