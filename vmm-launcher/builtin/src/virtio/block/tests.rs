use std::{fs::File, os::unix::fs::FileExt};

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_WRITE_ZEROES};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::virtio::fake_driver::{
    BUFFERS, EventLoop, FakeDriver,
    Piece::{self, Readable, Writable},
};

const DISK_BYTES: u64 = 1 << 20;
const HEADER: u64 = BUFFERS;
const RANGE: u64 = BUFFERS + 0x10;
/// Of indirect descriptors.
const TABLE: u64 = BUFFERS + 0x80;
const STATUS: u64 = BUFFERS + 0x100;
const BUFFER: u64 = BUFFERS + 0x1000;
/// Not a status.
const UNTOUCHED: u8 = 0xff;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IO_ERROR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

struct Fixture {
    block: Block,
    driver: FakeDriver,
    event_loop: EventLoop,
    file: File,
    _path: NamedTempFile,
}

impl Fixture {
    fn new(engine: IoEngine, read_only: bool) -> Self {
        let path = NamedTempFile::new().unwrap();
        path.as_file().set_len(DISK_BYTES).unwrap();
        let config = vmm::Block { path: path.path().to_str().unwrap().into(), read_only, ..vmm::Block::default() };
        let mut block = Block::open("disk-0", &config, engine).unwrap();
        let driver = FakeDriver::new(&QUEUE_SIZES);
        block.activate(driver.driver(block.features())).unwrap();
        let event_loop = EventLoop::new(&block, &driver);
        Self { block, driver, event_loop, file: path.reopen().unwrap(), _path: path }
    }

    fn writable() -> Self {
        Self::new(IoEngine::Auto, false)
    }

    fn offer(&mut self, kind: u32, sector: u64, data: &[Piece]) -> u16 {
        self.driver.write(HEADER, &header(kind, sector));
        self.driver.write(STATUS, &[UNTOUCHED]);
        self.driver.rings[0].offer_chain(&[&[Readable(HEADER, 16)], data, &[Writable(STATUS, 1)]].concat())
    }

    /// Has the device do all that it can.
    fn run(&mut self) -> Vec<(u16, u32)> {
        self.block.queue_notified(0);
        while self.block.active.as_ref().is_some_and(|active| !active.in_flight.is_empty()) {
            self.event_loop.step(&mut self.block, &self.driver);
        }
        self.driver.rings[0].all_used()
    }

    /// The status and how many bytes were written for one request.
    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        let head = self.offer(kind, sector, data);
        let used = self.run();
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, head);
        (self.driver.read(STATUS, 1)[0], used[0].1)
    }

    fn range_request(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.driver.write(RANGE, &range);
        self.request(kind, 0, &[Readable(RANGE, 16)]).0
    }

    fn on_disk(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file.read_exact_at(&mut data, offset).unwrap();
        data
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn writes_and_reads(engine: IoEngine) {
    let mut disk = Fixture::new(engine, false);
    disk.driver.write(BUFFER, &[7; 1024]);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 2, &[Readable(BUFFER, 512), Readable(BUFFER + 512, 512)]), (OK, 1));
    assert_eq!(disk.on_disk(1024, 1024), [7; 1024]);
    assert_eq!(disk.on_disk(0, 1024), [0; 1024]);

    let into = [Writable(BUFFER + 0x1000, 1), Writable(BUFFER + 0x2000, 511)];
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 3, &into), (OK, 513));
    assert_eq!(disk.driver.read(BUFFER + 0x1000, 2), [7, 0]);
    assert_eq!(disk.driver.read(BUFFER + 0x2000, 511), [7; 511]);
    assert!(disk.driver.was_interrupted());
}

#[test]
fn what_is_written_is_read_with_io_uring() {
    writes_and_reads(IoEngine::Auto);
}

#[test]
fn what_is_written_is_read_with_a_thread() {
    writes_and_reads(IoEngine::Thread);
}

#[test]
fn descriptors_may_be_indirect_and_framed_in_any_way() {
    let mut disk = Fixture::writable();
    disk.file.write_all_at(&[9; 512], 0).unwrap();
    disk.driver.write(HEADER, &header(VIRTIO_BLK_T_IN, 0));
    // The header in two pieces, an empty one between, the status at the end of the data.
    let next = VRING_DESC_F_NEXT as u16;
    let table = [
        Descriptor::new(HEADER, 5, next, 1),
        Descriptor::new(0, 0, next, 2),
        Descriptor::new(HEADER + 5, 11, next, 3),
        Descriptor::new(BUFFER, 513, VRING_DESC_F_WRITE as u16, 0),
    ];
    for (at, descriptor) in (TABLE..).step_by(16).zip(table) {
        disk.driver.memory.write_obj(descriptor, GuestAddress(at)).unwrap();
    }
    disk.driver.rings[0].describe(7, TABLE, 4 * 16, VRING_DESC_F_INDIRECT, 0);
    disk.driver.rings[0].offer(7);
    assert_eq!(disk.run(), [(7, 513)]);
    let mut expected = vec![9; 512];
    expected.push(OK);
    assert_eq!(disk.driver.read(BUFFER, 513), expected);
}

#[test]
fn many_requests_cost_one_interrupt() {
    let mut disk = Fixture::writable();
    let heads: Vec<u16> = (0..64).map(|sector| disk.offer(VIRTIO_BLK_T_IN, sector, &[Writable(BUFFER, 512)])).collect();
    let mut used: Vec<u16> = disk.run().into_iter().map(|(head, _)| head).collect();
    used.sort_unstable();
    assert_eq!(used, heads);
    assert!(disk.driver.was_interrupted());
}

#[test]
fn a_flush_is_answered() {
    let mut disk = Fixture::writable();
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn the_serial_number_is_the_device_id() {
    let mut disk = Fixture::writable();
    disk.driver.write(BUFFER, &[0xee; 32]);
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &[Writable(BUFFER, 20)]), (OK, 21));
    assert_eq!(disk.driver.read(BUFFER, 21), *b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xee");
}

#[test]
fn discarded_sectors_lose_their_content() {
    let mut disk = Fixture::writable();
    disk.file.write_all_at(&[7; 8192], 0).unwrap();
    assert_eq!(disk.range_request(VIRTIO_BLK_T_DISCARD, 0, 8, 0), OK);
    assert_eq!(disk.on_disk(0, 4097), [vec![0; 4096], vec![7]].concat());
}

#[test]
fn sectors_are_zeroed_with_and_without_their_storage() {
    let mut disk = Fixture::writable();
    disk.file.write_all_at(&[7; 8192], 0).unwrap();
    assert_eq!(disk.range_request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 1), OK);
    let status = disk.range_request(VIRTIO_BLK_T_WRITE_ZEROES, 1, 1, 0);
    // Some file systems (tmpfs) cannot, and the guest writes zeroes then.
    let zeroed = if status == UNSUPPORTED { 512 } else { 1024 };
    assert_eq!(disk.on_disk(0, zeroed), vec![0; zeroed]);
    assert_eq!(disk.on_disk(1024, 1), [7]);
}

#[test]
fn a_disk_that_shrinks_gives_errors() {
    let mut disk = Fixture::writable();
    disk.file.set_len(DISK_BYTES / 2).unwrap();
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, DISK_BYTES / 1024, &[Writable(BUFFER, 512)]), (IO_ERROR, 1));
    // Half of it is there.
    let sector = DISK_BYTES / 1024 - 1;
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, sector, &[Writable(BUFFER, 1024)]), (IO_ERROR, 1));
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[Writable(BUFFER, 512)]), (OK, 513));
}

#[test]
fn a_read_only_disk_is_not_changed() {
    let mut disk = Fixture::new(IoEngine::Auto, true);
    disk.driver.write(BUFFER, &[7; 512]);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, &[Readable(BUFFER, 512)]), (IO_ERROR, 1));
    assert_eq!(disk.range_request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 0), IO_ERROR);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(disk.on_disk(0, 512), [0; 512]);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut disk = Fixture::writable();
    let last = DISK_BYTES / 512;
    let read: &[Piece] = &[Writable(BUFFER, 512)];
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, last, read).0, IO_ERROR, "after the end");
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, last - 1, &[Writable(BUFFER, 1024)]).0, IO_ERROR, "across the end");
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, u64::MAX, read).0, IO_ERROR, "an offset that overflows");
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 1 << 55, read).0, IO_ERROR, "an end that overflows");
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[Writable(BUFFER, 511)]).0, IO_ERROR, "part of a sector");
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[]).0, IO_ERROR, "nothing to read into");
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, read).0, IO_ERROR, "wrong direction");
    assert_eq!(disk.request(99, 0, read).0, UNSUPPORTED);
    assert_eq!(disk.range_request(VIRTIO_BLK_T_DISCARD, 0, 0, 0), IO_ERROR, "an empty range");
    assert_eq!(disk.range_request(VIRTIO_BLK_T_DISCARD, last, 1, 0), IO_ERROR, "a range after the end");
    assert_eq!(disk.range_request(VIRTIO_BLK_T_DISCARD, u64::MAX, u32::MAX, 0), IO_ERROR, "a range that overflows");
    assert_eq!(disk.range_request(VIRTIO_BLK_T_DISCARD, 0, 1, 1), UNSUPPORTED, "a flag that discard has not");
    assert_eq!(disk.range_request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 2), UNSUPPORTED, "an unknown flag");
    assert_eq!(disk.request(VIRTIO_BLK_T_DISCARD, 0, &[Readable(RANGE, 15)]).0, IO_ERROR, "half a range");
}

#[test]
fn requests_that_cannot_be_answered_are_given_back() {
    let mut disk = Fixture::writable();
    let outside = 1 << 40;
    let unanswerable: [&[Piece]; 5] = [
        &[Readable(HEADER, 16)],
        &[Readable(HEADER, 16), Writable(STATUS, 0)],
        &[Readable(HEADER, 16), Writable(BUFFER, 512), Writable(outside, 1)],
        &[Readable(HEADER, 16), Writable(BUFFER, u32::MAX)],
        &[Writable(STATUS, 1), Readable(HEADER, 16)],
    ];
    for buffers in unanswerable {
        let head = disk.driver.rings[0].offer_chain(buffers);
        assert_eq!(disk.run(), [(head, 0)], "{buffers:?}");
    }
}

#[test]
fn a_header_that_is_too_short_is_refused() {
    let mut disk = Fixture::writable();
    let head = disk.driver.rings[0].offer_chain(&[Readable(HEADER, 15), Writable(STATUS, 1)]);
    assert_eq!(disk.run(), [(head, 1)]);
    assert_eq!(disk.driver.read(STATUS, 1), [IO_ERROR]);
}

#[test]
fn a_chain_that_is_a_loop_ends() {
    let mut disk = Fixture::writable();
    disk.driver.rings[0].describe(0, BUFFER, 512, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 0);
    disk.driver.rings[0].offer(0);
    assert_eq!(disk.run(), [(0, 1)]);
}

#[test]
fn the_same_request_many_times_is_bounded() {
    let mut disk = Fixture::writable();
    let head = disk.offer(VIRTIO_BLK_T_IN, 0, &[Writable(BUFFER, 512)]);
    (0..255).for_each(|_| disk.driver.rings[0].offer(head));
    assert_eq!(disk.run().len(), 256);
    assert!(disk.driver.was_kicked(0), "a full queue is all of a pass");
}

#[test]
fn a_broken_ring_is_ignored_until_the_reset() {
    let mut disk = Fixture::writable();
    disk.driver.rings[0].set_available(1000);
    assert_eq!(disk.run(), []);
    disk.offer(VIRTIO_BLK_T_FLUSH, 0, &[]);
    assert_eq!(disk.run(), []);

    disk.block.reset();
    disk.driver = FakeDriver::new(&QUEUE_SIZES);
    disk.block.activate(disk.driver.driver(disk.block.features())).unwrap();
    disk.event_loop = EventLoop::new(&disk.block, &disk.driver);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let mut disk = Fixture::writable();
    disk.driver.write(BUFFER, &[7; 512]);
    (0..64).for_each(|sector| {
        disk.driver.write(HEADER + 0x200 + sector * 16, &header(VIRTIO_BLK_T_OUT, sector));
        let request = [Readable(HEADER + 0x200 + sector * 16, 16), Readable(BUFFER, 512), Writable(STATUS, 1)];
        disk.driver.rings[0].offer_chain(&request);
    });
    disk.block.queue_notified(0);
    disk.block.reset();
    assert_eq!(disk.on_disk(0, 64 * 512), [7; 64 * 512]);
    assert!(disk.block.watches().is_empty());
}

#[test]
fn what_was_done_is_counted() {
    let mut disk = Fixture::writable();
    disk.request(VIRTIO_BLK_T_IN, 0, &[Writable(BUFFER, 1024)]);
    disk.request(VIRTIO_BLK_T_OUT, 0, &[Readable(BUFFER, 512)]);
    disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
    disk.request(VIRTIO_BLK_T_IN, u64::MAX, &[Writable(BUFFER, 512)]);
    let expected = [
        ("read_bytes_total", 1024),
        ("read_requests_total", 1),
        ("written_bytes_total", 512),
        ("write_requests_total", 1),
        ("flush_requests_total", 1),
        ("range_requests_total", 0),
        ("failed_requests_total", 1),
    ];
    assert_eq!(disk.block.metrics(), expected);
}

#[test]
fn the_configuration_tells_the_size_and_the_block() {
    let disk = Fixture::writable();
    let mut space = [0xff; 64];
    disk.block.read_config(0, &mut space);
    assert_eq!(space[..8], (DISK_BYTES / 512).to_le_bytes());
    assert_eq!(space[12..16], 254_u32.to_le_bytes());
    assert_eq!(space[20..24], 512_u32.to_le_bytes());
    assert_eq!(space[24], 3, "eight logical blocks in a physical one");
    assert_eq!(space[60..], [0; 4]);
}

#[test]
fn any_bytes_as_descriptors_do_no_harm() {
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..300 {
        let mut disk = Fixture::writable();
        for index in 0..4 {
            let (address_bits, length_bits) = (random.u32(1..64), random.u32(1..32));
            let (address, length) = (random.u64(..1 << address_bits), random.u32(..1 << length_bits));
            disk.driver.rings[0].describe(index, address, length, random.u32(..8), random.u16(..5));
        }
        (0..4).for_each(|_| disk.driver.rings[0].offer(random.u16(..5)));
        disk.run();
    }
}

#[test]
fn any_header_and_range_do_no_harm() {
    let mut random = fastrand::Rng::with_seed(2);
    let mut disk = Fixture::writable();
    for _ in 0..5000 {
        let kind = random.u32(..20);
        let sector = if random.bool() { random.u64(..) } else { random.u64(..4096) };
        let sectors = if random.bool() { random.u32(..) } else { random.u32(..4096) };
        if random.bool() {
            disk.range_request(kind, sector, sectors, random.u32(..3));
        } else {
            let len = random.u32(..0x1_0000);
            disk.request(kind, sector, &[if random.bool() { Writable(BUFFER, len) } else { Readable(BUFFER, len) }]);
        }
    }
    assert_eq!(disk.file.metadata().unwrap().len(), DISK_BYTES, "the disk keeps its size");
}
