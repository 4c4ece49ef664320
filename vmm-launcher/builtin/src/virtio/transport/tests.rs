use std::sync::{Arc, mpsc};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER};
use vm_memory::GuestAddress;

use super::*;
use crate::event_loop::{DeviceThread, EventLoop};

const KIND: u32 = 4;
const FEATURE: u64 = 1 << 5;
const MEMORY: usize = 1 << 20;

/// What the device was asked to do.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    Activate { features: u64, size: u16 },
    Notified(usize),
    Reset,
}

struct Recorder {
    calls: mpsc::Sender<Call>,
    fails: bool,
}

impl VirtioDevice for Recorder {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        let _ = self.calls.send(Call::Activate { features: driver.features, size: driver.queues[0].size() });
        if self.fails { Err("it was told to".into()) } else { Ok(()) }
    }

    fn queue_notified(&mut self, queue: usize) {
        let _ = self.calls.send(Call::Notified(queue));
    }

    fn reset(&mut self) {
        let _ = self.calls.send(Call::Reset);
    }
}

/// The driver's side.
struct Fixture {
    transport: Arc<Transport>,
    calls: mpsc::Receiver<Call>,
    line: EventFd,
    _thread: DeviceThread,
}

impl Fixture {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(fails: bool) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let (tell, calls) = mpsc::channel();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut event_loop = EventLoop::new().unwrap();
        let device = Box::new(Recorder { calls: tell, fails });
        let transport = Transport::new(device, memory, line.try_clone().unwrap(), event_loop.watcher()).unwrap();
        let transport = Arc::new(transport);
        event_loop.push(transport.clone());
        Self { transport, calls, line, _thread: event_loop.start().unwrap() }
    }

    fn read(&self, register: u32) -> u32 {
        let mut value = [0; 4];
        self.transport.read(register.into(), &mut value);
        u32::from_le_bytes(value)
    }

    fn write(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn add_status(&self, bits: u32) {
        self.write(VIRTIO_MMIO_STATUS, self.read(VIRTIO_MMIO_STATUS) | bits);
    }

    fn negotiate(&self, features: u64) {
        self.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE);
        self.add_status(VIRTIO_CONFIG_S_DRIVER);
        for half in [0, 1] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
    }

    fn set_up_queue(&self, descriptors: u32) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(VIRTIO_MMIO_QUEUE_NUM, 32);
        self.write(VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors);
        self.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
        self.write(VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn start(&self) {
        self.negotiate(VERSION_1 | FEATURE);
        self.set_up_queue(0x1000);
        self.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    }

    fn needs_reset(&self) -> bool {
        self.read(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }
}

const STARTED: Call = Call::Activate { features: VERSION_1 | FEATURE, size: 32 };

#[test]
fn a_driver_finds_a_modern_device() {
    let fixture = Fixture::new();
    let read = [VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_VERSION, VIRTIO_MMIO_DEVICE_ID].map(|at| fixture.read(at));
    assert_eq!(read, [u32::from_le_bytes(*b"virt"), 2, KIND]);
    assert_eq!(fixture.read(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
}

#[test]
fn features_are_offered_in_halves() {
    let fixture = Fixture::new();
    let offered = [0, 1, 2].map(|half| {
        fixture.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
        fixture.read(VIRTIO_MMIO_DEVICE_FEATURES)
    });
    assert_eq!(offered, [FEATURE as u32, 1, 0]);
}

#[test]
fn a_driver_that_is_ready_starts_the_device_once() {
    let fixture = Fixture::new();
    fixture.start();
    fixture.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    assert_eq!(fixture.calls.try_iter().collect::<Vec<_>>(), [STARTED]);
}

#[test]
fn a_feature_that_was_not_offered_is_refused() {
    let fixture = Fixture::new();
    fixture.negotiate(VERSION_1 | 1 << 9);
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK, 0);
}

#[test]
fn a_legacy_driver_is_refused() {
    let fixture = Fixture::new();
    fixture.negotiate(FEATURE);
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK, 0);
}

#[test]
fn features_do_not_change_after_they_were_accepted() {
    let fixture = Fixture::new();
    fixture.negotiate(VERSION_1 | FEATURE);
    fixture.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    fixture.write(VIRTIO_MMIO_DRIVER_FEATURES, 0xff);
    fixture.set_up_queue(0x1000);
    fixture.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    assert_eq!(fixture.calls.recv().unwrap(), STARTED);
}

#[test]
fn a_queue_that_is_not_in_memory_is_told_and_starts_nothing() {
    let fixture = Fixture::new();
    fixture.negotiate(VERSION_1);
    fixture.set_up_queue(MEMORY as u32);
    fixture.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    assert!(fixture.needs_reset());
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(fixture.line.read().unwrap(), 1);
    assert_eq!(fixture.calls.try_recv(), Err(mpsc::TryRecvError::Empty));
}

#[test]
fn a_device_that_cannot_start_is_reset_and_tells_its_driver() {
    let fixture = Fixture::with(true);
    fixture.start();
    assert!(fixture.needs_reset());
    assert_eq!(fixture.calls.try_iter().collect::<Vec<_>>(), [STARTED, Call::Reset]);
}

#[test]
fn a_device_starts_again_after_a_reset() {
    let fixture = Fixture::new();
    fixture.start();
    fixture.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_QUEUE_READY), 0);
    fixture.start();
    assert_eq!(fixture.calls.try_iter().collect::<Vec<_>>(), [STARTED, Call::Reset, STARTED]);
}

#[test]
fn a_kick_reaches_the_device_on_its_thread() {
    let fixture = Fixture::new();
    fixture.start();
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(fixture.calls.recv().unwrap(), STARTED);
    assert_eq!(fixture.calls.recv().unwrap(), Call::Notified(0));
}

#[test]
fn a_kick_of_a_device_that_does_not_work_is_lost() {
    let fixture = Fixture::new();
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 7);
    fixture.start();
    fixture.write(VIRTIO_MMIO_STATUS, 0);
    let calls: Vec<_> = fixture.calls.try_iter().filter(|call| *call != Call::Notified(0)).collect();
    assert_eq!(calls, [STARTED, Call::Reset]);
}

#[test]
fn an_acknowledged_interrupt_is_over_and_a_changed_configuration_has_a_new_number() {
    let fixture = Fixture::new();
    fixture.transport.interrupt.config_changed();
    fixture.transport.interrupt.used_buffers();
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG);
    fixture.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    assert_eq!(fixture.read(VIRTIO_MMIO_CONFIG_GENERATION), 1);
}

#[test]
fn accesses_of_any_place_and_width_do_no_harm() {
    let fixture = Fixture::new();
    fastrand::seed(1);
    for _ in 0..20_000 {
        let mut data = vec![fastrand::u8(..4); fastrand::usize(..9)];
        let offset = fastrand::u64(..VIRTIO_MMIO_CONFIG as u64 + 64);
        fixture.transport.write(offset, &data);
        fixture.transport.read(offset, &mut data);
    }
}
