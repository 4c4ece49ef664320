//! The device with real virtqueues in guest memory, and a fake driver behind them.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use tempfile::TempDir;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::fake_guest::{GUEST_CID, HOST_PORT, guest_ports};
use crate::vsock::packet::Operation::{CreditUpdate, ReadWrite, Request, Reset, Response};
use crate::vsock::packet::{HEADER_SIZE, Header, Operation, TYPE_STREAM};
use crate::vsock::{HOST_CID, Progress, RECEIVE_WINDOW, VsockDevice};

const QUEUE_SIZE: u16 = 64;
const BUFFER_SIZE: u32 = 4096 + HEADER_SIZE as u32;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;

/// The driver's half of one queue. (The `virtio-queue` crate's mock lets its rings overlap.)
struct Ring<'m> {
    memory: &'m GuestMemoryMmap,
    base: u64,
    buffers: u64,
    offered: u16,
    seen: u16,
}

impl<'m> Ring<'m> {
    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;

    fn new(memory: &'m GuestMemoryMmap, base: u64, buffers: u64) -> Self {
        memory.write_slice(&[0; 0x3000], GuestAddress(base)).unwrap();
        Self { memory, base, buffers, offered: 0, seen: 0 }
    }

    /// The device's half.
    fn queue(&self) -> Queue {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.base + Self::AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.base + Self::USED)).unwrap();
        queue.set_ready(true);
        queue
    }

    fn write<T: ByteValued>(&self, value: T, offset: u64) {
        self.memory.write_obj(value, GuestAddress(self.base + offset)).unwrap();
    }

    fn read<T: ByteValued>(&self, offset: u64) -> T {
        self.memory.read_obj(GuestAddress(self.base + offset)).unwrap()
    }

    fn buffer(&self, index: u16) -> GuestAddress {
        GuestAddress(self.buffers + u64::from(index) * 0x2000)
    }

    fn describe(&self, index: u16, address: GuestAddress, len: u32, flags: u32, next: u16) {
        let descriptor = Descriptor::new(address.0, len, flags as u16, next);
        self.write(descriptor, u64::from(index) * 16);
    }

    fn set_available(&self, index: u16) {
        self.write(index, Self::AVAILABLE + 2);
    }

    /// Makes the chain that starts at `head` available.
    fn offer(&mut self, head: u16) {
        self.write(head, Self::AVAILABLE + 4 + u64::from(self.offered % QUEUE_SIZE) * 2);
        self.offered = self.offered.wrapping_add(1);
        self.set_available(self.offered);
    }

    fn offer_writable(&mut self, head: u16) {
        self.describe(head, self.buffer(head), BUFFER_SIZE, VRING_DESC_F_WRITE, 0);
        self.offer(head);
    }

    /// The next used chain: its head and length.
    fn used(&mut self) -> Option<(u16, u32)> {
        if self.read::<u16>(Self::USED + 2) == self.seen {
            return None;
        }
        let element = Self::USED + 4 + u64::from(self.seen % QUEUE_SIZE) * 8;
        self.seen = self.seen.wrapping_add(1);
        Some((self.read::<u32>(element) as u16, self.read(element + 4)))
    }

    /// Sends a packet in one descriptor, if the ring has room.
    fn send(&mut self, header: Header, payload: &[u8]) -> bool {
        while self.used().is_some() {}
        if self.offered.wrapping_sub(self.seen) == QUEUE_SIZE {
            return false;
        }
        let head = self.offered % QUEUE_SIZE;
        let header = Header { len: payload.len() as u32, ..header };
        self.memory.write_slice(&header.to_bytes(), self.buffer(head)).unwrap();
        let data = GuestAddress(self.buffer(head).0 + HEADER_SIZE as u64);
        self.memory.write_slice(payload, data).unwrap();
        let length = (HEADER_SIZE + payload.len()) as u32;
        self.describe(head, self.buffer(head), length, 0, 0);
        self.offer(head);
        true
    }

    /// Takes a packet out of the receive queue and gives the buffer back.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, length) = self.used()?;
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, self.buffer(head)).unwrap();
        let payload = bytes.split_off(HEADER_SIZE);
        self.offer_writable(head);
        Some((Header::from_bytes(&bytes.try_into().unwrap()), payload))
    }
}

/// A device, its queues, and a host program that listens on `HOST_PORT`.
struct Machine<'m> {
    memory: &'m GuestMemoryMmap,
    device: VsockDevice,
    rx: Ring<'m>,
    tx: Ring<'m>,
    rx_queue: Queue,
    tx_queue: Queue,
    listener: UnixListener,
    _dir: TempDir,
}

fn guest_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()
}

impl<'m> Machine<'m> {
    fn new(memory: &'m GuestMemoryMmap) -> Self {
        let dir = TempDir::new().unwrap();
        let device = VsockDevice::new(&dir.path().join("v"), GUEST_CID).unwrap();
        let listener = UnixListener::bind(dir.path().join(format!("v_{HOST_PORT}"))).unwrap();
        let rx = Ring::new(memory, 0x1000, RX_BUFFERS);
        let tx = Ring::new(memory, 0x8000, TX_BUFFERS);
        let rx_queue = rx.queue();
        let tx_queue = tx.queue();
        Self { memory, device, rx, tx, rx_queue, tx_queue, listener, _dir: dir }
    }

    fn with_rx_buffers(memory: &'m GuestMemoryMmap) -> Self {
        let mut machine = Self::new(memory);
        (0..QUEUE_SIZE).for_each(|head| machine.rx.offer_writable(head));
        machine
    }

    fn process(&mut self) -> Progress {
        self.device.handle_host_events();
        self.device.process(self.memory, &mut self.rx_queue, &mut self.tx_queue).unwrap()
    }

    fn send(&mut self, operation: Operation, payload: &[u8]) {
        assert!(self.tx.send(header(operation), payload));
    }

    fn connect(&mut self) -> UnixStream {
        self.send(Request, &[]);
        self.process();
        assert_eq!(self.rx.take().unwrap().0.operation, Response as u16);
        let program = self.listener.accept().unwrap().0;
        program.set_nonblocking(true).unwrap();
        program
    }
}

fn header(operation: Operation) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: guest_ports().guest,
        dst_port: guest_ports().host,
        socket_type: TYPE_STREAM,
        operation: operation as u16,
        buf_alloc: RECEIVE_WINDOW,
        ..Header::default()
    }
}

#[test]
fn packet_is_answered_and_both_queues_interrupt() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    machine.send(Request, &[]);
    let progress = machine.process();
    assert_eq!(progress, Progress { interrupt_rx: true, interrupt_tx: true, more: false });
    assert_eq!(machine.rx.take().unwrap().0.operation, Response as u16);
    assert!(machine.tx.used().is_some());
}

#[test]
fn nothing_to_do_interrupts_nobody() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    assert_eq!(machine.process(), Progress::default());
}

#[test]
fn packet_waits_for_a_receive_buffer() {
    let memory = guest_memory();
    let mut machine = Machine::new(&memory);
    machine.send(Request, &[]);
    let progress = machine.process();
    assert_eq!(progress, Progress { interrupt_rx: false, interrupt_tx: true, more: false });

    machine.rx.offer_writable(0);
    assert!(machine.process().interrupt_rx);
    assert_eq!(machine.rx.take().unwrap().0.operation, Response as u16);
}

#[test]
fn packet_may_be_cut_into_descriptors_anywhere() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    let mut program = machine.connect();
    let mut packet = Header { len: 6, ..header(ReadWrite) }.to_bytes().to_vec();
    packet.extend(b"abcdef");
    memory.write_slice(&packet, GuestAddress(TX_BUFFERS)).unwrap();
    let at = |offset| GuestAddress(TX_BUFFERS + offset);
    machine.tx.describe(10, at(0), 20, VRING_DESC_F_NEXT, 11);
    machine.tx.describe(11, at(20), 26, VRING_DESC_F_NEXT, 12);
    machine.tx.describe(12, at(46), 4, 0, 0);
    machine.tx.offer(10);
    machine.process();
    let mut bytes = [0; 6];
    program.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abcdef");
}

#[test]
fn received_packet_may_be_cut_into_descriptors_anywhere() {
    let memory = guest_memory();
    let mut machine = Machine::new(&memory);
    let at = |offset| GuestAddress(RX_BUFFERS + offset);
    machine.rx.describe(0, at(0), 20, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
    machine.rx.describe(1, at(20), 26, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 2);
    machine.rx.describe(2, at(46), 100, VRING_DESC_F_WRITE, 0);
    machine.send(Request, &[]);
    machine.rx.offer(0);
    machine.process();
    machine.rx.used().unwrap();
    machine.listener.accept().unwrap().0.write_all(b"abcdef").unwrap();
    machine.rx.offer(0);
    machine.process();

    assert_eq!(machine.rx.used(), Some((0, HEADER_SIZE as u32 + 6)));
    let mut bytes = [0; 6];
    memory.read_slice(&mut bytes, at(HEADER_SIZE as u64)).unwrap();
    assert_eq!(&bytes, b"abcdef");
}

#[test]
fn chain_that_is_too_short_for_a_header_is_given_back() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    machine.tx.describe(0, GuestAddress(TX_BUFFERS), HEADER_SIZE as u32 - 1, 0, 0);
    machine.tx.offer(0);
    machine.process();
    assert_eq!(machine.tx.used(), Some((0, 0)));
    assert_eq!(machine.rx.used(), None);
}

#[test]
fn chain_outside_guest_memory_is_given_back() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    machine.tx.describe(0, GuestAddress(u64::MAX - 10), 4096, 0, 0);
    machine.tx.offer(0);
    machine.process();
    assert_eq!(machine.tx.used(), Some((0, 0)));
}

#[test]
fn chain_that_never_ends_is_given_back() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    machine.tx.describe(0, GuestAddress(TX_BUFFERS), 100, VRING_DESC_F_NEXT, 0);
    machine.tx.offer(0);
    machine.process();
    assert_eq!(machine.tx.used(), Some((0, 0)));
}

#[test]
fn receive_buffer_without_room_for_payload_is_given_back_empty() {
    let memory = guest_memory();
    let mut machine = Machine::new(&memory);
    machine.rx.describe(0, GuestAddress(RX_BUFFERS), HEADER_SIZE as u32, VRING_DESC_F_WRITE, 0);
    machine.rx.offer(0);
    machine.send(Request, &[]);
    machine.process();
    assert_eq!(machine.rx.used(), Some((0, 0)));
}

#[test]
fn payload_shorter_than_its_header_says_resets_the_connection() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    let _program = machine.connect();
    let bytes = Header { len: 4096, ..header(ReadWrite) }.to_bytes();
    memory.write_slice(&bytes, GuestAddress(TX_BUFFERS)).unwrap();
    machine.tx.describe(9, GuestAddress(TX_BUFFERS), HEADER_SIZE as u32 + 100, 0, 0);
    machine.tx.offer(9);
    machine.process();
    assert_eq!(machine.rx.take().unwrap().0.operation, Reset as u16);
}

#[test]
fn ring_that_claims_more_than_it_holds_is_an_error_each_time() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    machine.tx.set_available(QUEUE_SIZE + 1);
    let mut process = || machine.device.process(&memory, &mut machine.rx_queue, &mut machine.tx_queue);
    assert!(process().is_err());
    assert!(process().is_err());
}

#[test]
fn driver_that_starts_afresh_loses_its_connections() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    let mut program = machine.connect();
    machine.rx = Ring::new(&memory, 0x1000, RX_BUFFERS);
    machine.tx = Ring::new(&memory, 0x8000, TX_BUFFERS);
    machine.rx_queue = machine.rx.queue();
    machine.tx_queue = machine.tx.queue();
    machine.process();
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
}

#[test]
fn queues_that_were_only_stopped_keep_their_connections() {
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    let mut program = machine.connect();
    let (rx, tx) = (machine.rx_queue.next_avail(), machine.tx_queue.next_avail());
    machine.rx_queue.set_next_avail(rx);
    machine.tx_queue.set_next_avail(tx);
    machine.send(ReadWrite, b"still here");
    machine.process();
    let mut bytes = [0; 10];
    program.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still here");
}

#[test]
fn thirty_two_mebibytes_arrive_intact_both_ways_at_once() {
    const TOTAL: usize = 32 << 20;
    let memory = guest_memory();
    let mut machine = Machine::with_rx_buffers(&memory);
    let mut program = machine.connect();
    let pattern: Vec<u8> = (0..TOTAL as u64).map(|i| (i * i / 251 + i) as u8).collect();

    let (mut to_guest, mut to_host, mut from_guest, mut from_host) = (0, 0, 0, 0);
    let mut host_read = 0u32;
    let mut chunk = vec![0; 100_000];
    while from_guest < TOTAL || from_host < TOTAL {
        // The host program, which does not care about packets.
        if let Ok(count) = program.write(&pattern[to_guest..TOTAL.min(to_guest + 70_001)]) {
            to_guest += count;
        }
        if let Ok(count) = program.read(&mut chunk) {
            assert!(chunk[..count] == pattern[from_guest..from_guest + count]);
            from_guest += count;
        }
        // The guest, which sends while it has credit and confirms what it gets.
        while to_host < TOTAL && to_host - (host_read as usize) < RECEIVE_WINDOW as usize {
            let credit = RECEIVE_WINDOW as usize - (to_host - host_read as usize);
            let end = TOTAL.min(to_host + credit.min(4000));
            let header = Header { fwd_cnt: from_host as u32, ..header(ReadWrite) };
            if !machine.tx.send(header, &pattern[to_host..end]) {
                break;
            }
            to_host = end;
        }
        machine.process();
        let before = from_host;
        while let Some((header, payload)) = machine.rx.take() {
            assert_ne!(header.operation, Reset as u16);
            assert!(payload == pattern[from_host..from_host + payload.len()]);
            from_host += payload.len();
            host_read = header.fwd_cnt;
        }
        if from_host != before {
            machine.tx.send(Header { fwd_cnt: from_host as u32, ..header(CreditUpdate) }, &[]);
        }
    }
}
