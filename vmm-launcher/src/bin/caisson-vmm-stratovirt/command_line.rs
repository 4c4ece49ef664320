//! StratoVirt's command line: arguments, and the descriptors that they name by number. Its values are split at commas and
//! cannot be quoted.

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::Path,
};

use caisson_protocol::vmm::{Balloon, Block, Net, VmConfig};
use caisson_vmm_launcher::{Error, Result, kernel, kernel::KernelFormat};

use crate::options::Options;

/// The console is the serial port, and a panic ends the guest at once. Without ACPI the guest cannot switch itself off: its
/// agent reboots, which StratoVirt takes for the same. It has no keyboard controller to reset by, but notices a triple fault.
const KERNEL_PARAMS: &str =
    "console=ttyS0 quiet panic=-1 reboot=t pci=off acpi=off random.trust_cpu=on 8250.nr_uarts=1 caisson.end=reboot";
/// What `-m` accepts.
const MIN_MEMORY_MIB: u64 = 128;

/// Grows until StratoVirt is started.
#[derive(Debug)]
pub struct CommandLine {
    pub arguments: Vec<String>,
    pub descriptors: Vec<OwnedFd>,
}

impl CommandLine {
    /// A machine without devices that waits before its first instruction.
    ///
    /// # Errors
    /// When StratoVirt does not boot such a kernel, or has another idea of how little memory a VM can have.
    pub fn new(vm: &VmConfig, options: &Options, shared_memory: bool) -> Result<Self> {
        if kernel::format(Path::new(&vm.kernel))? != KernelFormat::BzImage {
            return Err(Error::Invalid(format!(
                "the guest kernel {} is a vmlinux; StratoVirt's microvm boots a bzImage",
                vm.kernel
            )));
        }
        if vm.memory_mib < MIN_MEMORY_MIB {
            return Err(Error::Invalid(format!(
                "{} MiB of memory are too little for StratoVirt: at least {MIN_MEMORY_MIB}",
                vm.memory_mib
            )));
        }
        let mut line = Self { arguments: Vec::new(), descriptors: Vec::new() };
        let shared = if shared_memory { ",mem-share=on" } else { "" };
        line.push("-machine", format!("microvm,dump-guest-core=off{shared}"));
        line.push("-smp", vm.vcpus.to_string());
        line.push("-m", format!("{}M", vm.memory_mib));
        line.push("-kernel", &vm.kernel);
        if !vm.initrd.is_empty() {
            line.push("-initrd", &vm.initrd);
        }
        line.push("-append", kernel_params(vm));
        line.arguments.push("-S".into());
        if !options.seccomp {
            line.arguments.push("-disable-seccomp".into());
        }
        Ok(line)
    }

    /// The machine protocol, and then the serial port, on sockets that StratoVirt makes.
    pub fn sockets(&mut self, protocol: &Path, console: &Path) -> Result<()> {
        self.push("-qmp", format!("unix:{},server,nowait", plain("socket", protocol)?));
        self.push("-serial", format!("socket,path={},server,nowait", plain("socket", console)?));
        Ok(())
    }

    pub fn block(&mut self, id: &str, block: &Block) -> Result<()> {
        let path = plain("disk", Path::new(&block.path))?;
        let read_only = if block.read_only { "on" } else { "off" };
        self.push("-drive", format!("id=disk-{id},file={path},readonly={read_only},direct=off"));
        self.push("-device", format!("virtio-blk-device,drive=disk-{id},id={id},serial={id}"));
        Ok(())
    }

    /// `tap` is the interface's one queue.
    pub fn net(&mut self, id: &str, net: &Net, tap: OwnedFd) {
        let fd = self.inherit(tap);
        self.push("-netdev", format!("tap,id=net-{id},fd={fd}"));
        self.push("-device", format!("virtio-net-device,netdev=net-{id},id={id},mac={}", net.mac));
    }

    pub fn vsock(&mut self, id: &str, cid: u32, vhost: OwnedFd) {
        let fd = self.inherit(vhost);
        self.push("-device", format!("vhost-vsock-device,id={id},guest-cid={cid},vhostfd={fd}"));
    }

    /// virtiofsd listens on `socket`.
    pub fn fs(&mut self, id: &str, tag: &str, socket: &Path) -> Result<()> {
        self.push("-chardev", format!("socket,id=fs-{id},path={}", plain("socket", socket)?));
        self.push("-device", format!("vhost-user-fs-device,id={id},chardev=fs-{id},tag={tag}"));
        Ok(())
    }

    pub fn rng(&mut self, id: &str, source: &str) -> Result<()> {
        let source = plain("source of entropy", Path::new(source))?;
        self.push("-object", format!("rng-random,id=rng-{id},filename={source}"));
        self.push("-device", format!("virtio-rng-device,rng=rng-{id},id={id}"));
        Ok(())
    }

    pub fn balloon(&mut self, id: &str, balloon: &Balloon) {
        let reporting = balloon.free_page_reporting;
        self.push(
            "-device",
            format!("virtio-balloon-device,id={id},deflate-on-oom=true,free-page-reporting={reporting}"),
        );
    }

    fn push(&mut self, flag: &str, value: impl Into<String>) {
        self.arguments.extend([flag.to_owned(), value.into()]);
    }

    fn inherit(&mut self, fd: OwnedFd) -> RawFd {
        let number = fd.as_raw_fd();
        self.descriptors.push(fd);
        number
    }
}

/// `path`, if StratoVirt can be told of it.
fn plain<'a>(what: &str, path: &'a Path) -> Result<&'a str> {
    match path.to_str() {
        Some(text) if !text.contains(',') => Ok(text),
        _ => Err(Error::Invalid(format!(
            "the {what} {} has a comma in its path, which StratoVirt cannot be told",
            path.display()
        ))),
    }
}

fn kernel_params(vm: &VmConfig) -> String {
    let root = if vm.image.is_empty() { "" } else { " root=/dev/vda ro" };
    format!("{KERNEL_PARAMS}{root} {}", vm.kernel_params).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(change: impl FnOnce(&mut VmConfig)) -> Result<CommandLine> {
        let kernel = tempfile::NamedTempFile::new().unwrap();
        let mut image = vec![0; 0x202];
        image.extend_from_slice(b"HdrS");
        std::fs::write(kernel.path(), image).unwrap();
        let kernel = kernel.path().display().to_string();
        let mut vm = VmConfig { kernel, vcpus: 1, memory_mib: 256, ..Default::default() };
        change(&mut vm);
        CommandLine::new(&vm, &Options::default(), true)
    }

    #[test]
    fn a_path_cannot_add_properties() {
        let disk = Block { path: "/a,readonly=off".into(), read_only: true, ..Default::default() };
        let error = line(|_| {}).unwrap().block("root", &disk).unwrap_err().to_string();
        assert_eq!(error, "the disk /a,readonly=off has a comma in its path, which StratoVirt cannot be told");
    }

    #[test]
    fn memory_is_shared_with_device_backends() {
        assert!(line(|_| {}).unwrap().arguments.contains(&"microvm,dump-guest-core=off,mem-share=on".into()));
    }

    #[test]
    fn a_card_is_on_a_descriptor_that_stratovirt_inherits() {
        let mut line = line(|_| {}).unwrap();
        let net = Net { tap: "tap0".into(), mac: "02:00:00:00:00:01".into(), ..Default::default() };
        line.net("net", &net, std::fs::File::open("/dev/null").unwrap().into());
        let fd = line.descriptors[0].as_raw_fd();
        assert!(line.arguments.contains(&format!("tap,id=net-net,fd={fd}")), "{line:?}");
    }

    #[test]
    fn the_system_call_filter_is_on() {
        assert!(!line(|_| {}).unwrap().arguments.contains(&"-disable-seccomp".into()));
    }

    #[test]
    fn a_vmlinux_is_refused() {
        let elf = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(elf.path(), b"\x7fELF").unwrap();
        let error = line(|vm| vm.kernel = elf.path().display().to_string()).unwrap_err().to_string();
        assert!(error.ends_with("is a vmlinux; StratoVirt's microvm boots a bzImage"), "{error}");
    }

    #[test]
    fn too_little_memory_is_refused() {
        let error = line(|vm| vm.memory_mib = 64).unwrap_err().to_string();
        assert_eq!(error, "64 MiB of memory are too little for StratoVirt: at least 128");
    }
}
