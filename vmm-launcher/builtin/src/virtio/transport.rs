//! virtio over MMIO, virtio 1.2 §4.2: the registers by which a driver finds, negotiates and starts one device.
//!
//! ```text
//!            ACKNOWLEDGE, DRIVER, FEATURES_OK           DRIVER_OK
//!  reset ──────────────────────────────────► negotiated ─────────► active ──► (device fails) needs reset
//!    ▲                                           │                   │              │
//!    └──────────────── driver writes 0 to the status ────────────────┴──────────────┘
//! ```

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
};

use caisson_vmm_launcher::{Error, Result};
use kvm_ioctls::{IoEventAddress, VmFd};
use tracing::warn;
use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
    },
    virtio_mmio::*,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::{
    epoll::EventSet,
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{Driver, Event, Interrupt, VirtioDevice, device::ActivateError};
use crate::{
    bus::BusDevice,
    event_loop::{Handler, Watcher},
    memory::GuestMemory,
};

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Any number but 0.
const VENDOR: u32 = 0x4341_4953;
/// Where the device's configuration begins.
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// A token of the device's own watches begins here; smaller ones are queues.
const FIRST_WATCH: u32 = 1 << 16;

/// One device with its registers.
pub struct Transport {
    /// [`VirtioDevice::is_served_elsewhere`].
    served_elsewhere: bool,
    interrupt: Interrupt,
    /// Counts the changes of the configuration that the driver was told of.
    generation: AtomicU32,
    kicks: Vec<EventFd>,
    memory: GuestMemory,
    watcher: Watcher,
    registers: Mutex<Registers>,
}

/// What the driver writes, and the device that it does this to.
struct Registers {
    device: Box<dyn VirtioDevice>,
    queues: Vec<Queue>,
    status: u32,
    /// Which half of the features the driver reads and writes.
    device_features_half: u32,
    driver_features_half: u32,
    features: u64,
    queue: u32,
    active: bool,
    watched: Vec<RawFd>,
}

impl Transport {
    /// Presents `device`, whose interrupt is raised by `line`. The guest's kicks come by the event loop behind `watcher`.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory, line: EventFd, watcher: Watcher) -> Result<Self> {
        let action = "make a virtio device's queues";
        let kick = |_: &u16| EventFd::new(EFD_NONBLOCK);
        let kicks: Vec<_> =
            device.queue_sizes().iter().map(kick).collect::<std::io::Result<_>>().map_err(Error::host(action))?;
        let served_elsewhere = device.is_served_elsewhere();
        if !served_elsewhere {
            for (number, kick) in (0..).zip(&kicks) {
                watcher.add(kick.as_raw_fd(), EventSet::IN, number).map_err(Error::host(action))?;
            }
        }
        let registers = Mutex::new(Registers {
            queues: new_queues(device.as_ref()),
            device,
            status: 0,
            device_features_half: 0,
            driver_features_half: 0,
            features: 0,
            queue: 0,
            active: false,
            watched: Vec::new(),
        });
        let (interrupt, generation) = (Interrupt::new(line), AtomicU32::new(0));
        Ok(Self { served_elsewhere, interrupt, generation, kicks, memory, watcher, registers })
    }

    /// Has KVM turn the guest's kicks at `address`, and the device's interrupts, into signals.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn connect(&self, vm: &VmFd, address: u64, interrupt: u32) -> Result<()> {
        let notify = IoEventAddress::Mmio(address + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        (0u32..)
            .zip(&self.kicks)
            .try_for_each(|(number, kick)| vm.register_ioevent(kick, &notify, number))
            .and_then(|()| vm.register_irqfd(self.interrupt.line(), interrupt))
            .map_err(|error| Error::host("connect a virtio device to its guest")(error.into()))
    }

    /// Waits until whoever serves the device has answered.
    ///
    /// # Errors
    /// When it does not.
    pub fn meet_backend(&self) -> Result<()> {
        self.registers().device.meet_backend().map_err(|error| Error::Hypervisor(error.to_string()))
    }

    /// What the device has counted.
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.registers().device.metrics()
    }

    /// Ends the device's work: it touches guest memory no more.
    pub fn reset(&self) {
        let mut registers = self.registers();
        self.reset_device(&mut registers);
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().expect("devices do not panic")
    }

    fn read_register(&self, register: u32) -> u32 {
        match register {
            // Read at every interrupt: without the device's lock.
            VIRTIO_MMIO_INTERRUPT_STATUS => {
                let reasons = self.interrupt.status().load(Ordering::SeqCst);
                if self.served_elsewhere { reasons | VIRTIO_MMIO_INT_VRING } else { reasons }
            }
            VIRTIO_MMIO_CONFIG_GENERATION => self.generation.load(Ordering::SeqCst),
            _ => self.registers().read(register),
        }
    }

    fn write_register(&self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_INTERRUPT_ACK => {
                let reasons = self.interrupt.status().fetch_and(!value, Ordering::SeqCst);
                if reasons & value & VIRTIO_MMIO_INT_CONFIG != 0 {
                    self.generation.fetch_add(1, Ordering::SeqCst);
                }
            }
            // KVM takes what is aligned and four bytes wide by itself.
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.registers().write(register, value),
        }
    }

    fn write_status(&self, status: u32) {
        let mut registers = self.registers();
        if status == 0 {
            return self.reset_device(&mut registers);
        }
        // A driver adds bits one after the other, and never takes one back.
        registers.status |= status & 0xff & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !registers.features_are_acceptable() {
            registers.status &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let ready = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        if registers.status & (ready | VIRTIO_CONFIG_S_NEEDS_RESET) == ready
            && !registers.active
            && let Err(error) = self.activate(&mut registers)
        {
            warn!(kind = registers.device.kind(), error, "a virtio device cannot be started");
            self.reset_device(&mut registers);
            registers.status = status | VIRTIO_CONFIG_S_NEEDS_RESET;
            self.interrupt.config_changed();
        }
    }

    fn activate(&self, registers: &mut Registers) -> Result<(), ActivateError> {
        if let Some(queue) = registers.queues.iter().position(|queue| queue.ready() && !queue.is_valid(&self.memory)) {
            return Err(format!("queue {queue} is not in guest memory").into());
        }
        let driver = Driver {
            features: registers.features,
            memory: self.memory.clone(),
            queues: std::mem::take(&mut registers.queues),
            kicks: self.kicks.iter().map(EventFd::try_clone).collect::<Result<_, _>>()?,
            interrupt: self.interrupt.clone(),
        };
        registers.active = true;
        registers.device.activate(driver)?;
        for watch in registers.device.watches() {
            self.watcher.add(watch.descriptor, watch.events, FIRST_WATCH + watch.token)?;
            registers.watched.push(watch.descriptor);
        }
        Ok(())
    }

    fn reset_device(&self, registers: &mut Registers) {
        for descriptor in registers.watched.drain(..) {
            let _ = self.watcher.remove(descriptor);
        }
        if std::mem::replace(&mut registers.active, false) {
            registers.device.reset();
        }
        registers.queues = new_queues(registers.device.as_ref());
        registers.status = 0;
        (registers.device_features_half, registers.driver_features_half) = (0, 0);
        registers.features = 0;
        registers.queue = 0;
        self.interrupt.status().store(0, Ordering::SeqCst);
    }
}

impl BusDevice for Transport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            data.fill(0);
            return self.registers().device.read_config(offset, data);
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(value) => *value = self.read_register(offset as u32).to_le_bytes(),
            Err(_) => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.registers().device.write_config(offset, data);
        }
        if let Ok(value) = data.try_into() {
            self.write_register(offset as u32, u32::from_le_bytes(value));
        }
    }
}

impl Handler for Transport {
    fn ready(&self, token: u32, events: EventSet) {
        match token.checked_sub(FIRST_WATCH) {
            None => {
                // A kick that another event has taken along: nothing to do.
                let queue = token as usize;
                if self.kicks[queue].read().is_ok() {
                    let mut registers = self.registers();
                    if registers.active {
                        registers.device.queue_notified(queue);
                    }
                }
            }
            Some(token) => {
                let mut registers = self.registers();
                if registers.active {
                    registers.device.event(Event { token, events });
                }
            }
        }
    }
}

impl Registers {
    fn read(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.kind(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered(), self.device_features_half),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| queue.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |queue| queue.ready().into()),
            VIRTIO_MMIO_STATUS => self.status,
            // There is no shared memory: its length is "-1", virtio 1.2 §4.2.2.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write(&mut self, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_half = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_half = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue = value,
            _ => self.write_queue(register, value),
        }
    }

    /// Only before the driver has said FEATURES_OK.
    fn write_features(&mut self, value: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            let kept = match self.driver_features_half {
                0 => self.features >> 32 << 32 | u64::from(value),
                1 => self.features & 0xffff_ffff | u64::from(value) << 32,
                _ => self.features,
            };
            self.features = kept;
        }
    }

    /// Only before the device works with the queues.
    fn write_queue(&mut self, register: u32, value: u32) {
        let number = self.queue as usize;
        let Some(queue) = self.queues.get_mut(number) else { return };
        match register {
            // What is too large or no power of two is not taken, and the queue then keeps its largest size.
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | VERSION_1
    }

    fn features_are_acceptable(&self) -> bool {
        self.features & VERSION_1 != 0 && self.features & !self.offered() == 0
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue as usize)
    }
}

fn new_queues(device: &dyn VirtioDevice) -> Vec<Queue> {
    let queue = |size: &u16| Queue::new(*size).expect("a device's queue sizes are powers of two");
    device.queue_sizes().iter().map(queue).collect()
}

fn half(features: u64, half: u32) -> u32 {
    match half {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
