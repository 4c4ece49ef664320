//! A driver for tests: virtqueues in guest memory, from the driver's side.

use std::{iter, os::fd::AsRawFd};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT, desc::split::Descriptor};
use vm_memory::{ByteValued, Bytes, FileOffset, GuestAddress};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{Driver, Event, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;

/// Of the guest's memory, in bytes. The queues are at its beginning.
pub const MEMORY_SIZE: u64 = 8 << 20;
/// From here on memory is free for buffers.
pub const BUFFERS: u64 = 1 << 20;

/// A driver with its guest's memory.
pub struct FakeDriver {
    pub memory: GuestMemory,
    pub rings: Vec<Ring>,
    pub kicks: Vec<EventFd>,
    /// What the device writes to interrupt.
    pub line: EventFd,
}

/// One piece of a chain.
#[derive(Clone, Copy, Debug)]
pub enum Piece {
    Readable(u64, u32),
    Writable(u64, u32),
}

impl FakeDriver {
    /// A queue for each of `sizes`.
    pub fn new(sizes: &[u16]) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY_SIZE).unwrap();
        let range = (GuestAddress(0), MEMORY_SIZE as usize, Some(FileOffset::new(file, 0)));
        let memory = GuestMemory::from_ranges_with_files([range]).unwrap();
        let ring = |(index, size): (u64, &u16)| Ring::new(&memory, (index + 1) * Ring::SPACE, *size);
        let rings = (0..).zip(sizes).map(ring).collect();
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self { rings, kicks: sizes.iter().map(|_| eventfd()).collect(), line: eventfd(), memory }
    }

    /// What the transport gives to the device.
    pub fn driver(&self, features: u64) -> Driver {
        let clone = |eventfd: &EventFd| eventfd.try_clone().unwrap();
        Driver {
            features,
            memory: self.memory.clone(),
            queues: self.rings.iter().map(Ring::queue).collect(),
            kicks: self.kicks.iter().map(clone).collect(),
            interrupt: Interrupt::new(clone(&self.line)),
        }
    }

    /// Whether the device has interrupted since this was last asked.
    pub fn was_interrupted(&self) -> bool {
        self.line.read().is_ok()
    }

    /// Whether queue `index` was kicked since this was last asked.
    pub fn was_kicked(&self, index: usize) -> bool {
        self.kicks[index].read().is_ok()
    }

    /// Waits until the device has interrupted since this was last asked.
    pub fn wait_for_interrupt(&self) {
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, self.line.as_raw_fd(), event).unwrap();
        next_event(&epoll).expect("the device interrupts");
        self.line.read().unwrap();
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// The device thread's loop, for one device.
pub struct EventLoop {
    epoll: Epoll,
}

impl EventLoop {
    /// Watches what an active `device` wants to be watched, and its queues unless another process does.
    pub fn new(device: &dyn VirtioDevice, driver: &FakeDriver) -> Self {
        let epoll = Epoll::new().unwrap();
        let add = |descriptor, events, data| {
            epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(events, data)).unwrap();
        };
        for watch in device.watches() {
            add(watch.descriptor, watch.events, u64::from(watch.token));
        }
        if !device.is_served_elsewhere() {
            (KICK..).zip(&driver.kicks).for_each(|(data, kick)| add(kick.as_raw_fd(), EventSet::IN, data));
        }
        Self { epoll }
    }

    /// Waits until something happens, and tells the device.
    pub fn step(&self, device: &mut dyn VirtioDevice, driver: &FakeDriver) {
        let event = next_event(&self.epoll).expect("something happens");
        match event.data().checked_sub(KICK) {
            Some(queue) => {
                driver.kicks[queue as usize].read().unwrap();
                device.queue_notified(queue as usize);
            }
            None => device.event(Event { token: event.data() as u32, events: event.event_set() }),
        }
    }
}

/// None: nothing has happened for a long time.
fn next_event(epoll: &Epoll) -> Option<EpollEvent> {
    let mut event = [EpollEvent::default()];
    loop {
        match epoll.wait(LIMIT_MS, &mut event) {
            Ok(count) => return (count > 0).then_some(event[0]),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Interrupted),
        }
    }
}

/// Queues' events are numbered from here on.
const KICK: u64 = 1 << 32;
/// For whatever a test waits for.
const LIMIT_MS: i32 = 60_000;

/// The driver's half of a queue.
pub struct Ring {
    memory: GuestMemory,
    base: u64,
    size: u16,
    described: u16,
    offered: u16,
    seen: u16,
}

impl Ring {
    const SPACE: u64 = 0x1_0000;
    const AVAILABLE: u64 = 0x8000;
    const USED: u64 = 0xa000;

    fn new(memory: &GuestMemory, base: u64, size: u16) -> Self {
        Self { memory: memory.clone(), base, size, described: 0, offered: 0, seen: 0 }
    }

    /// The device's half.
    fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.base + Self::AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.base + Self::USED)).unwrap();
        queue.set_ready(true);
        queue
    }

    fn store<T: ByteValued>(&self, offset: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(self.base + offset)).unwrap();
    }

    fn load<T: ByteValued>(&self, offset: u64) -> T {
        self.memory.read_obj(GuestAddress(self.base + offset)).unwrap()
    }

    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u32, next: u16) {
        self.store(u64::from(index) * 16, Descriptor::new(address, length, flags as u16, next));
    }

    /// Claims that so many chains are available.
    pub fn set_available(&self, count: u16) {
        self.store(Self::AVAILABLE + 2, count);
    }

    /// Asks for an interrupt when the chain with this number is used (`VIRTIO_RING_F_EVENT_IDX`).
    pub fn set_used_event(&self, number: u16) {
        self.store(Self::AVAILABLE + 4 + 2 * u64::from(self.size), number);
    }

    /// Makes the chain that starts at descriptor `head` available.
    pub fn offer(&mut self, head: u16) {
        self.store(Self::AVAILABLE + 4 + u64::from(self.offered % self.size) * 2, head);
        self.offered = self.offered.wrapping_add(1);
        self.set_available(self.offered);
    }

    /// Makes a chain of `pieces` available, and answers its head.
    pub fn offer_chain(&mut self, pieces: &[Piece]) -> u16 {
        let index = |n: usize| (self.described + n as u16) % self.size;
        for (n, piece) in pieces.iter().enumerate() {
            let more = if n + 1 < pieces.len() { VRING_DESC_F_NEXT } else { 0 };
            let (address, length, flags) = match *piece {
                Piece::Readable(address, length) => (address, length, more),
                Piece::Writable(address, length) => (address, length, more | VRING_DESC_F_WRITE),
            };
            self.describe(index(n), address, length, flags, index(n + 1));
        }
        let head = index(0);
        self.described = index(pieces.len());
        self.offer(head);
        head
    }

    /// The next used chain: its head and how much was written to it.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.load::<u16>(Self::USED + 2) == self.seen {
            return None;
        }
        let element = Self::USED + 4 + u64::from(self.seen % self.size) * 8;
        self.seen = self.seen.wrapping_add(1);
        Some((self.load::<u32>(element) as u16, self.load(element + 4)))
    }
    /// All used chains that there are.
    pub fn all_used(&mut self) -> Vec<(u16, u32)> {
        iter::from_fn(|| self.used()).collect()
    }
}
