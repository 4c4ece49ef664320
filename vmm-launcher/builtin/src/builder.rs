//! How a VM starts: one recipe, which ends with the guest before its first instruction.

use std::{os::fd::OwnedFd, path::Path, sync::Arc, thread};

use caisson_protocol::vmm::VmConfig;
use caisson_vmm_launcher::{Error, Result, virtiofsd::FileServers};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    arch::{
        self, acpi,
        kernel::{self, Entry},
        layout,
    },
    devices::{Devices, Made, NamedDevice},
    ending::Ending,
    event_loop::{EventLoop, STACK_BYTES},
    machine::{Attached, Machine},
    memory::{self, GuestMemory, Pages},
    options::Options,
    power::{self, KeyboardReset, Power},
    seccomp::Filter,
    serial::{self, Serial},
    vcpu::{Buses, Vcpus},
    virtio::Transport,
};

/// For every guest: the console is the serial port, a panic ends the VM at once, only a panic and what the agent says is
/// worth a slow serial port, the processor's random numbers are trusted, and there is one serial port to look for.
///
/// A machine without PCI that is searched for it costs some ten thousand exits; and Linux takes hardware-reduced ACPI for
/// EFI, which it would ask for a reset.
const PARAMETERS: &str =
    "console=ttyS0 quiet panic=-1 reboot=t pci=off random.trust_cpu=on 8250.nr_uarts=1 cryptomgr.notests";

/// What a VM is built of beside its configuration, which was checked.
pub struct Parts<'a> {
    /// The backend's own options.
    pub options: &'a Options,
    /// For sockets that exist for a moment.
    pub run_dir: &'a Path,
    /// The far end of the console.
    pub console: OwnedFd,
    /// Where the VM's end is told.
    pub ending: &'a Ending,
    /// What the threads that carry out the guest's wishes are confined by, if they are.
    pub filter: Option<Filter>,
    /// Gets the processes that the VM's devices need.
    pub file_servers: &'a mut FileServers,
}

/// Builds the VM. Answers where the guest finds its devices, in the request's order.
///
/// # Errors
/// When anything of it cannot be had; nothing of it is left then.
pub fn build_vm(config: &VmConfig, parts: Parts<'_>) -> Result<(Machine, Vec<String>)> {
    let kvm = open_kvm()?;
    let devices = Devices::new(parts.options, parts.run_dir, parts.file_servers);
    let (vm, content) = create_vm_while(&kvm, || Content::make(config, devices))?;
    let Content { memory, entry, devices: Made { devices, addresses, balloon } } = content;

    memory::give_to_kvm(&memory, &vm)?;
    arch::create_interrupt_controllers(&vm)?;
    let vcpus = arch::create_vcpus(&kvm, &vm, config.vcpus, entry)?;

    let (mut event_loop, mut buses) = (EventLoop::new()?, Buses::default());
    let serial = add_serial(parts.console, &vm, &mut buses, &mut event_loop)?;
    let attached = add_virtio(devices, &memory, &vm, &mut buses, &mut event_loop)?;
    let button = interrupt_line(&vm, layout::BUTTON_INTERRUPT)?;
    add_power(parts.ending, &mut buses);

    Vcpus::catch_kicks()?;
    let (vcpus, device_thread) =
        confined(parts.filter, || Ok((Vcpus::start(vcpus, Arc::new(buses), parts.ending)?, event_loop.start()?)))?;
    Ok((Machine { vcpus, device_thread, attached, balloon, serial, button, vm, memory }, addresses))
}

/// What a VM is made of that KVM has no part in.
struct Content {
    memory: GuestMemory,
    entry: Entry,
    devices: Made,
}

impl Content {
    fn make(config: &VmConfig, devices: Devices<'_>) -> Result<Self> {
        let mut memory = memory::allocate_as(config.memory_mib, Pages::of(config))?;
        let ram = memory.clone();
        // Their processes start while the kernel is loaded.
        let devices = devices.make(config, &mut memory)?;
        let entry = kernel::load(config, &kernel_parameters(config), &ram)?;
        acpi::write(&memory, config.vcpus, devices.devices.len() as u32)?;
        Ok(Self { memory, entry, devices })
    }
}

/// An empty VM, and what `make` makes meanwhile: KVM starts a kernel thread for each VM and waits until all processors know of
/// it (`kvm_vm_create_worker_thread` in virt/kvm/kvm_main.c), which takes longer than the rest.
fn create_vm_while<T>(kvm: &Kvm, make: impl FnOnce() -> Result<T>) -> Result<(VmFd, T)> {
    let failed = |error| Error::host("make a VM with /dev/kvm")(error);
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK_BYTES);
        let vm = thread.spawn_scoped(scope, || kvm.create_vm()).map_err(failed)?;
        let made = make()?;
        let vm = vm.join().expect("it makes one system call");
        Ok((vm.map_err(|error| failed(error.into()))?, made))
    })
}

/// What `start` answers, whose threads have all submitted to `filter`: they inherit it from one that did. Making the kernel take
/// it costs more than starting them.
fn confined<T: Send>(filter: Option<Filter>, start: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let Some(filter) = filter else { return start() };
    thread::scope(|scope| {
        let first = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, || {
            filter.submit();
            start()
        });
        first
            .map_err(Error::host("start the VM's threads"))?
            .join()
            .expect("it starts threads, which may fail, and no more")
    })
}

fn open_kvm() -> Result<Kvm> {
    Kvm::new().map_err(|error| {
        let why = "the built-in VMM needs KVM, which cannot be used on this machine";
        Error::Invalid(format!("{why}: /dev/kvm cannot be opened: {error}"))
    })
}

fn kernel_parameters(config: &VmConfig) -> String {
    let root = if config.image.is_empty() { "" } else { "root=/dev/vda ro" };
    let all = [PARAMETERS, root, &config.kernel_params];
    all.into_iter().filter(|parameters| !parameters.is_empty()).collect::<Vec<_>>().join(" ")
}

fn add_serial(console: OwnedFd, vm: &VmFd, buses: &mut Buses, event_loop: &mut EventLoop) -> Result<Arc<Serial>> {
    let interrupt = interrupt_line(vm, layout::SERIAL_INTERRUPT)?;
    let serial = Arc::new(Serial::new(console, interrupt, event_loop.watcher())?);
    event_loop.push(serial.clone());
    buses.ports.insert(ports(layout::SERIAL_PORT, serial::REGISTERS), serial.clone());
    Ok(serial)
}

fn add_virtio(
    devices: Vec<NamedDevice>,
    memory: &GuestMemory,
    vm: &VmFd,
    buses: &mut Buses,
    event_loop: &mut EventLoop,
) -> Result<Vec<Attached>> {
    let attach = |(number, NamedDevice { id, kind, device }): (u32, _)| {
        let line = EventFd::new(EFD_NONBLOCK).map_err(Error::host("make an interrupt"))?;
        let transport = Arc::new(Transport::new(device, memory.clone(), line, event_loop.watcher())?);
        let registers = layout::virtio_registers(number);
        transport.connect(vm, registers.start, layout::virtio_interrupt(number))?;
        event_loop.push(transport.clone());
        buses.memory.insert(registers, transport.clone());
        Ok(Attached { id, kind, transport })
    };
    (0..).zip(devices).map(attach).collect()
}

fn add_power(ending: &Ending, buses: &mut Buses) {
    buses.ports.insert(ports(layout::POWER_PORT, power::REGISTERS), Arc::new(Power::new(ending.clone())));
    buses.ports.insert(ports(layout::KEYBOARD_PORT, 1), Arc::new(KeyboardReset::new(ending.clone())));
}

/// An interrupt that is raised by writing to what this answers.
fn interrupt_line(vm: &VmFd, number: u32) -> Result<EventFd> {
    let line = EventFd::new(EFD_NONBLOCK).map_err(Error::host("make an interrupt"))?;
    vm.register_irqfd(&line, number).map_err(|error| Error::host("connect an interrupt")(error.into()))?;
    Ok(line)
}

fn ports(first: u16, count: u16) -> std::ops::Range<u64> {
    u64::from(first)..u64::from(first) + u64::from(count)
}
