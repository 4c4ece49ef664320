//! acrn-dm's command line (`acrn-dm --help`; devicemodel/core/main.c). Its values are split at commas and cannot be quoted.

use std::{collections::BTreeSet, fs::OpenOptions, path::Path};

use caisson_protocol::vmm::{Block, Net, Rng, VmConfig};
use caisson_vmm_launcher::{Error, Result, kernel, kernel::KernelFormat, tap};

use crate::options::Options;

/// The console is the serial port, a panic ends the guest at once, and only a panic and what the agent says is worth it. A
/// triple fault ends the guest (hypervisor/arch/x86/guest/vm_reset.c), where its reset register would start it anew.
const KERNEL_PARAMS: &str = "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on";
/// `STR_LEN` in include/sw_load.h, with its terminating zero.
const MAX_KERNEL_PARAMS: usize = 1023;
/// What `vm_parse_memsize` accepts.
const MIN_MEMORY_MIB: u64 = 128;
/// `MAXSLOTS` of a PCI bus, `PCI_SLOTMAX` + 1.
const SLOTS: u8 = 32;
/// Of `Options::disk_slots`.
const MAX_DISK_SLOTS: u8 = 16;
/// For a disk that has no image, wherever it is found in what acrn-dm is told of a disk.
const NO_DISK: &str = "nodisk";
/// acrn-dm reads the first of these, hw/pci/virtio/virtio_rnd.c; the other is the same source.
const ENTROPY: [&str; 2] = ["/dev/random", "/dev/urandom"];

/// Grows until acrn-dm is started.
#[derive(Debug)]
pub struct CommandLine {
    arguments: Vec<String>,
    /// The next is the last.
    free_slots: Vec<u8>,
}

impl CommandLine {
    /// A machine without devices. `console` is a terminal.
    pub fn new(vm: &VmConfig, options: &Options, console: &Path, monitor: &Path) -> Result<Self> {
        check(vm, options)?;
        let filled = slots_filled_by(&options.extra_args);
        let free_slots = (2..SLOTS).rev().filter(|slot| !filled.contains(slot)).collect();
        let mut line = Self { arguments: Vec::new(), free_slots };
        line.push("-m", format!("{}M", vm.memory_mib));
        line.push("-s", "0:0,hostbridge");
        line.push("-s", "1:0,lpc");
        line.push("-l", format!("com1,{}", console.display()));
        line.push("-k", &vm.kernel);
        if !vm.initrd.is_empty() {
            line.push("-r", &vm.initrd);
        }
        line.push("-B", kernel_params(vm));
        line.push("--iasl", &options.iasl);
        line.push("--cmd_monitor", monitor.display().to_string());
        if !options.cpu_affinity.is_empty() {
            let ids: Vec<_> = processors(options).iter().take(vm.vcpus as usize).map(u32::to_string).collect();
            line.push("--cpu_affinity", ids.join(","));
        }
        Ok(line)
    }

    /// Answers where the guest finds the disk.
    pub fn block(&mut self, block: &Block) -> Result<String> {
        self.device(&format!("virtio-blk,{}", disk(block)?)).map(address)
    }

    /// Empty disks, which `blkrescan` fills later: all that are `required`, and as many of the `likely` as there is room for.
    /// Answers their slots.
    pub fn empty_disks(&mut self, required: u8, likely: u32) -> Result<Vec<u8>> {
        let likely = self.free_slots.len().min(likely as usize);
        (0..likely.max(required.into())).map(|_| self.device(&format!("virtio-blk,{NO_DISK}"))).collect()
    }

    pub fn net(&mut self, id: &str, net: &Net) -> Result<()> {
        if net.queue_pairs > 1 {
            return Err(Error::Unsupported(format!(
                "network device \"{id}\" cannot have {} queue pairs: ACRN's have one",
                net.queue_pairs
            )));
        }
        // acrn-dm makes a card without a link of one that it cannot open.
        drop(tap::open(net)?);
        self.device(&format!("virtio-net,tap={},mac={}", net.tap, net.mac)).map(drop)
    }

    pub fn vsock(&mut self, cid: u32) -> Result<()> {
        self.device(&format!("vhost-vsock,cid={cid}")).map(drop)
    }

    pub fn rng(&mut self, rng: &Rng) -> Result<()> {
        if !ENTROPY.contains(&rng.source.as_str()) {
            return Err(Error::Unsupported(format!(
                "{} cannot be the source of entropy: ACRN's is {}",
                rng.source, ENTROPY[0]
            )));
        }
        self.device("virtio-rnd").map(drop)
    }

    /// All of it; `name` comes last.
    pub fn finish(mut self, options: &Options, name: String) -> Vec<String> {
        self.arguments.extend(options.extra_args.iter().cloned());
        self.arguments.push(name);
        self.arguments
    }

    fn device(&mut self, device: &str) -> Result<u8> {
        let slot = self
            .free_slots
            .pop()
            .ok_or_else(|| Error::Invalid(format!("ACRN takes {} devices, and {device} is one more", SLOTS - 2)))?;
        self.push("-s", format!("{slot},{device}"));
        Ok(slot)
    }

    fn push(&mut self, flag: &str, value: impl Into<String>) {
        self.arguments.extend([flag.to_owned(), value.into()]);
    }
}

/// Where the guest finds the device in `slot`.
pub fn address(slot: u8) -> String {
    format!("pci:0000:00:{slot:02x}.0")
}

/// `block` as acrn-dm is told of it.
///
/// # Errors
/// When it would make something else of it, without a word.
pub fn disk(block: &Block) -> Result<String> {
    let path = &block.path;
    if path.contains(',') {
        return Err(Error::Invalid(format!("the disk {path} has a comma in its path, which ACRN cannot be told")));
    }
    if path.contains(NO_DISK) {
        return Err(Error::Invalid(format!("the disk {path} has \"{NO_DISK}\" in its path, which has ACRN use none")));
    }
    if block.read_only {
        return Ok(format!("{path},ro"));
    }
    // It makes a read-only disk of one that it cannot write to.
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|source| Error::File { what: "writable disk", path: path.into(), source })?;
    Ok(path.clone())
}

/// `cpu_affinity`; ACRN counts a processor once.
fn processors(options: &Options) -> BTreeSet<u32> {
    options.cpu_affinity.iter().copied().collect()
}

/// Whatever has a place of its own: `-s [<bus>:]<slot>[:<function>],…`, hw/pci/core.c.
fn slots_filled_by(extra_args: &[String]) -> BTreeSet<u8> {
    let devices = extra_args.windows(2).filter(|pair| ["-s", "--pci_slot"].contains(&pair[0].as_str()));
    let slots = devices.filter_map(|pair| {
        let place: Vec<_> = pair[1].split(',').next()?.split([':', '/', '.']).collect();
        match place[..] {
            [slot] | [slot, _] | ["0", slot, _] => slot.parse().ok(),
            _ => None,
        }
    });
    slots.collect()
}

fn check(vm: &VmConfig, options: &Options) -> Result<()> {
    if kernel::format(Path::new(&vm.kernel))? != KernelFormat::BzImage {
        return Err(Error::Invalid(format!("the guest kernel {} is a vmlinux; ACRN boots a bzImage", vm.kernel)));
    }
    if vm.memory_mib < MIN_MEMORY_MIB {
        return Err(Error::Invalid(format!(
            "{} MiB of memory are too little for ACRN: at least {MIN_MEMORY_MIB}",
            vm.memory_mib
        )));
    }
    let params = kernel_params(vm);
    if params.len() > MAX_KERNEL_PARAMS {
        return Err(Error::Invalid(format!(
            "the kernel command line has {} bytes, and ACRN takes {MAX_KERNEL_PARAMS}: shorten kernel_params",
            params.len()
        )));
    }
    // Without any, a guest has as many as ACRN's scenario says, `hcall_create_vm` of hypervisor/common/hypercall.c.
    let processors = processors(options).len();
    if vm.vcpus > 1 && processors < vm.vcpus as usize {
        return Err(Error::Invalid(format!(
            "cpu_affinity names {processors} processors for {} vCPUs: name one for each in [hypervisor.acrn]",
            vm.vcpus
        )));
    }
    if options.disk_slots > MAX_DISK_SLOTS {
        return Err(Error::Invalid(format!(
            "disk_slots {} is out of range: 0 to {MAX_DISK_SLOTS}",
            options.disk_slots
        )));
    }
    Ok(())
}

fn kernel_params(vm: &VmConfig) -> String {
    let root = if vm.image.is_empty() { "" } else { " root=/dev/vda ro" };
    format!("{KERNEL_PARAMS}{root} {}", vm.kernel_params).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut image = vec![0; 0x202];
        image.extend_from_slice(b"HdrS");
        std::fs::write(file.path(), image).unwrap();
        file
    }

    fn line(change: impl FnOnce(&mut VmConfig, &mut Options)) -> Result<CommandLine> {
        let kernel = bzimage();
        let kernel = kernel.path().display().to_string();
        let mut vm = VmConfig { kernel, vcpus: 1, memory_mib: 256, ..Default::default() };
        let mut options = Options::default();
        change(&mut vm, &mut options);
        CommandLine::new(&vm, &options, Path::new("/dev/pts/7"), Path::new("/run/m.sock"))
    }

    fn refusal(change: impl FnOnce(&mut VmConfig, &mut Options)) -> String {
        line(change).unwrap_err().to_string()
    }

    #[test]
    fn devices_get_slots_after_the_bridges() {
        let mut line = line(|_, _| {}).unwrap();
        let disk = Block { path: "/d".into(), read_only: true, ..Default::default() };
        assert_eq!(line.block(&disk).unwrap(), "pci:0000:00:02.0");
        assert_eq!(line.empty_disks(1, 0).unwrap(), [3]);
        assert!(line.arguments.ends_with(&["-s".into(), "3,virtio-blk,nodisk".into()]));
    }

    #[test]
    fn slots_of_extra_arguments_are_left_to_them() {
        let extra_args =
            ["-s", "2,virtio-rnd", "-s", "0:3:0,passthru,0/2/0", "-s", "4:1,virtio-rnd", "-s", "1:5:0,dummy"];
        let mut line = line(|_, options| options.extra_args = extra_args.map(str::to_owned).into()).unwrap();
        assert_eq!(line.empty_disks(2, 0).unwrap(), [5, 6]);
    }

    #[test]
    fn there_are_as_many_empty_disks_as_are_required_or_likely() {
        assert_eq!(line(|_, _| {}).unwrap().empty_disks(4, 10).unwrap().len(), 10);
        assert_eq!(line(|_, _| {}).unwrap().empty_disks(4, 3).unwrap().len(), 4);
    }

    #[test]
    fn likely_disks_take_no_more_than_the_room_that_is_left() {
        let mut line = line(|_, _| {}).unwrap();
        line.vsock(3).unwrap();
        assert_eq!(line.empty_disks(4, 48).unwrap().len(), 29);
    }

    #[test]
    fn required_disks_without_room_are_refused() {
        let mut line = line(|_, _| {}).unwrap();
        line.empty_disks(16, 0).unwrap();
        let error = line.empty_disks(16, 0).unwrap_err().to_string();
        assert_eq!(error, "ACRN takes 30 devices, and virtio-blk,nodisk is one more");
    }

    #[test]
    fn the_name_is_the_last_argument() {
        let options = Options { extra_args: vec!["--rtvm".into()], ..Default::default() };
        let arguments = line(|_, _| {}).unwrap().finish(&options, "caisson-1".into());
        assert!(arguments.ends_with(&["--rtvm".into(), "caisson-1".into()]));
    }

    #[test]
    fn a_path_with_a_comma_is_refused() {
        let error = disk(&Block { path: "/a,ro".into(), ..Default::default() }).unwrap_err().to_string();
        assert!(error.starts_with("the disk /a,ro has a comma"), "{error}");
    }

    #[test]
    fn a_path_that_acrn_would_take_for_no_disk_is_refused() {
        let block = Block { path: "/nodisks/a".into(), read_only: true, ..Default::default() };
        let error = disk(&block).unwrap_err().to_string();
        assert!(error.starts_with("the disk /nodisks/a has \"nodisk\" in its path"), "{error}");
    }

    #[test]
    fn a_disk_to_write_to_that_cannot_be_written_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        let error = disk(&Block { path: path.into(), ..Default::default() }).unwrap_err().to_string();
        assert_eq!(error, format!("open the writable disk {path}"));
    }

    #[test]
    fn a_card_with_several_queues_is_unsupported() {
        let net = Net { tap: "tap0".into(), queue_pairs: 2, ..Default::default() };
        let error = line(|_, _| {}).unwrap().net("net", &net).unwrap_err();
        assert!(
            matches!(error, Error::Unsupported(why) if why.starts_with("network device \"net\" cannot have 2 queue"))
        );
    }

    #[test]
    fn another_source_of_entropy_is_unsupported() {
        let error =
            line(|_, _| {}).unwrap().rng(&Rng { source: "/dev/hwrng".into(), ..Default::default() }).unwrap_err();
        assert_eq!(error.to_string(), "/dev/hwrng cannot be the source of entropy: ACRN's is /dev/random");
    }

    #[test]
    fn a_vmlinux_is_refused() {
        let elf = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(elf.path(), b"\x7fELF").unwrap();
        let error = refusal(|vm, _| vm.kernel = elf.path().display().to_string());
        assert!(error.ends_with("is a vmlinux; ACRN boots a bzImage"), "{error}");
    }

    #[test]
    fn too_little_memory_is_refused() {
        assert_eq!(refusal(|vm, _| vm.memory_mib = 64), "64 MiB of memory are too little for ACRN: at least 128");
    }

    #[test]
    fn a_command_line_that_would_be_cut_off_is_refused() {
        let error = refusal(|vm, _| vm.kernel_params = "x".repeat(1000));
        assert!(error.ends_with("and ACRN takes 1023: shorten kernel_params"), "{error}");
    }

    #[test]
    fn each_vcpu_needs_its_processor() {
        let error = refusal(|vm, options| {
            vm.vcpus = 2;
            options.cpu_affinity = vec![4, 4];
        });
        assert_eq!(error, "cpu_affinity names 1 processors for 2 vCPUs: name one for each in [hypervisor.acrn]");
    }

    #[test]
    fn several_vcpus_are_not_left_to_the_scenario() {
        let error = refusal(|vm, _| vm.vcpus = 2);
        assert!(error.starts_with("cpu_affinity names 0 processors for 2 vCPUs"), "{error}");
    }
}
