//! virtio-pmem (virtio 1.2 §5.19): a file of the host that the guest reads as memory, with no copy of its own.
//!
//! The builder maps the [`PmemImage`] into guest physical memory; this device only tells where, and flushes. The host must not
//! make the file shorter meanwhile: touching what is gone ends the virtual machine.

use caisson_protocol::vmm;
use caisson_vmm_launcher::{Error, Result};
use slab::Slab;
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_PMEM,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};
use vmm_sys_util::epoll::EventSet;

use super::{
    Driver, Event, VirtioDevice, Watch,
    buffers::{Buffers, Segments},
    config_space,
    device::ActivateError,
    disk_io::{Engine, IoEngine, MAX_IN_FLIGHT, Means, Operation},
    image::Image,
    virtqueue::{Chain, Virtqueue},
};
use crate::memory::GuestMemory;

/// The unit of the image's size and place in bytes: Linux maps persistent memory in huge pages.
pub const ALIGNMENT: u64 = 2 << 20;

const QUEUE_SIZES: [u16; 1] = [64];

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`, the one type of request.
const FLUSH: u32 = 0;

/// `struct virtio_pmem_resp`.
const DONE: i32 = 0;
const FAILED: i32 = -1;

/// An image that is open, locked and ready to be mapped into guest memory.
#[derive(Debug)]
pub struct PmemImage(Image);

impl PmemImage {
    /// Opens, checks and locks the image.
    ///
    /// # Errors
    /// As for [`Image::open`], and where its size is not a multiple of [`ALIGNMENT`].
    pub fn open(pmem: &vmm::Pmem) -> Result<Self> {
        let image = Image::open("pmem image", &pmem.path, pmem.read_only)?;
        if !image.len.is_multiple_of(ALIGNMENT) {
            return Err(Error::Invalid(format!(
                "the pmem image {} has {} bytes, which is not a multiple of 2 MiB; `truncate -s {}M` makes it one",
                pmem.path,
                image.len,
                image.len.next_multiple_of(ALIGNMENT) >> 20
            )));
        }
        Ok(Self(image))
    }

    /// In bytes, a multiple of [`ALIGNMENT`].
    pub fn size(&self) -> u64 {
        self.0.len
    }

    /// Maps the image for guest physical address `start`. What a guest writes goes to the file, or, where the image is read-only,
    /// to memory of the guest's own.
    ///
    /// # Errors
    /// The host has no room for it.
    pub fn region(&self, start: GuestAddress) -> Result<GuestRegionMmap<()>> {
        let backing = FileOffset::from_arc(self.0.file.clone(), 0);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let sharing = if self.0.is_read_only { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let mapping = MmapRegion::build(Some(backing), self.0.len as usize, access, sharing | libc::MAP_NORESERVE);
        let mapping = mapping.map_err(|error| Error::Invalid(format!("map the pmem image: {error}")))?;
        GuestRegionMmap::new(mapping, start)
            .ok_or_else(|| Error::Invalid(format!("the pmem image does not fit at {:#x}", start.0)))
    }
}

/// Persistent memory.
#[derive(Debug)]
pub struct Pmem {
    image: Image,
    start: GuestAddress,
    means: Means,
    active: Option<Active>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    flush_requests: u64,
    failed_requests: u64,
}

/// Persistent memory with a driver.
#[derive(Debug)]
struct Active {
    /// `None` for a read-only image, which needs no flush.
    engine: Option<Box<dyn Engine>>,
    queue: Virtqueue,
    memory: GuestMemory,
    /// Requests whose flush is under way, by the token of its operation: their number and where the answer goes.
    in_flight: Slab<(u16, Segments)>,
}

impl Pmem {
    /// `image`, whose region is in guest memory at `start`.
    pub fn new(image: PmemImage, start: GuestAddress) -> Self {
        let engine = if image.0.is_read_only { IoEngine::Thread } else { IoEngine::Auto };
        Self { image: image.0, start, means: Means::prepare(engine), active: None, counters: Counters::default() }
    }

    fn pass(&mut self) {
        let Some(active) = &mut self.active else { return };
        active.complete(&mut self.counters);
        active.start(&mut self.counters);
        active.submit();
        active.complete(&mut self.counters);
        active.queue.finish();
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = [self.start.0, self.image.len].map(u64::to_le_bytes);
        config_space::read(space.as_flattened(), offset, data);
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        let memory = driver.memory.clone();
        let queue = Virtqueue::all(driver).into_iter().next().flatten().ok_or("the driver set up no queue")?;
        let open = || self.means.open(&self.image.file, &memory);
        let engine = (!self.image.is_read_only).then(open).transpose()?;
        self.active = Some(Active { engine, queue, memory, in_flight: Slab::new() });
        Ok(())
    }

    fn watches(&self) -> Vec<Watch> {
        let engine = self.active.iter().filter_map(|active| active.engine.as_ref());
        engine.map(|engine| Watch { descriptor: engine.descriptor(), events: EventSet::IN, token: 0 }).collect()
    }

    fn queue_notified(&mut self, _queue: usize) {
        self.pass();
    }

    fn event(&mut self, _event: Event) {
        self.pass();
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("flush_requests_total", self.counters.flush_requests),
            ("failed_requests_total", self.counters.failed_requests),
        ]
    }
}

impl Active {
    /// Starts a flush for each available request.
    fn start(&mut self, counters: &mut Counters) {
        let Self { engine, queue, in_flight, .. } = self;
        queue.serve(MAX_IN_FLIGHT - in_flight.len(), |memory, head, chain| {
            let response = match parse(memory, chain) {
                Ok(response) => response,
                Err(response) => return Some(answer(memory, &response, FAILED, counters)),
            };
            let Some(engine) = engine else { return Some(answer(memory, &response, DONE, counters)) };
            let token = in_flight.insert((head, response));
            if engine.push(token as u64, Operation::Flush).is_ok() {
                return None;
            }
            let (_, response) = in_flight.remove(token);
            Some(answer(memory, &response, FAILED, counters))
        });
    }

    fn submit(&mut self) {
        if self.engine.as_mut().is_some_and(|engine| engine.submit().is_err()) {
            self.queue.serve_again();
        }
    }

    /// Answers the requests whose flush has ended.
    fn complete(&mut self, counters: &mut Counters) {
        let Some(engine) = &mut self.engine else { return };
        while let Some(completion) = engine.next_completion() {
            let (head, response) = self.in_flight.remove(completion.token as usize);
            let code = if completion.result.is_ok() { DONE } else { FAILED };
            let written = answer(&self.memory, &response, code, counters);
            self.queue.complete(head, written);
        }
    }
}

/// Where a flush is to be answered; as an error, where anything else is.
fn parse(memory: &GuestMemory, chain: Chain<'_>) -> Result<Segments, Segments> {
    let Some(Buffers { mut readable, writable }) = Buffers::of(memory, chain) else { return Err(Segments::default()) };
    let mut kind = [0; 4];
    let is_flush = readable.take(memory, &mut kind) && u32::from_le_bytes(kind) == FLUSH;
    if is_flush { Ok(writable) } else { Err(writable) }
}

/// Writes a response; answers how many bytes were written.
fn answer(memory: &GuestMemory, response: &Segments, code: i32, counters: &mut Counters) -> u32 {
    match code {
        DONE => counters.flush_requests += 1,
        _ => counters.failed_requests += 1,
    }
    response.write(memory, &code.to_le_bytes()) as u32
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::FileExt};

    use tempfile::NamedTempFile;
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::fake_driver::{
        BUFFERS, EventLoop, FakeDriver,
        Piece::{Readable, Writable},
    };

    const START: GuestAddress = GuestAddress(1 << 32);
    const RESPONSE: u64 = BUFFERS + 0x100;

    fn image(len: u64, read_only: bool) -> (NamedTempFile, Result<PmemImage>) {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        let image = PmemImage::open(&vmm::Pmem { path, read_only, ..vmm::Pmem::default() });
        (file, image)
    }

    fn active(read_only: bool) -> (Pmem, FakeDriver) {
        let mut pmem = Pmem::new(image(ALIGNMENT, read_only).1.unwrap(), START);
        let driver = FakeDriver::new(pmem.queue_sizes());
        pmem.activate(driver.driver(pmem.features())).unwrap();
        (pmem, driver)
    }

    fn run(pmem: &mut Pmem, driver: &FakeDriver) {
        let event_loop = EventLoop::new(pmem, driver);
        pmem.queue_notified(0);
        while pmem.active.as_ref().is_some_and(|active| !active.in_flight.is_empty()) {
            event_loop.step(pmem, driver);
        }
    }

    fn flush(read_only: bool) {
        let (mut pmem, mut driver) = active(read_only);
        driver.write(RESPONSE, &[0xff; 4]);
        let head = driver.rings[0].offer_chain(&[Readable(BUFFERS, 4), Writable(RESPONSE, 4)]);
        run(&mut pmem, &driver);
        assert_eq!(driver.rings[0].all_used(), [(head, 4)]);
        assert_eq!(driver.read(RESPONSE, 4), DONE.to_le_bytes());
        assert!(driver.was_interrupted());
    }

    #[test]
    fn a_flush_is_answered() {
        flush(false);
    }

    #[test]
    fn a_flush_of_a_read_only_image_is_answered() {
        flush(true);
    }

    #[test]
    fn what_is_no_flush_fails() {
        let (mut pmem, mut driver) = active(false);
        driver.write(BUFFERS, &1_u32.to_le_bytes());
        let unknown = driver.rings[0].offer_chain(&[Readable(BUFFERS, 4), Writable(RESPONSE, 4)]);
        let short = driver.rings[0].offer_chain(&[Readable(BUFFERS, 3), Writable(RESPONSE, 4)]);
        let without_response = driver.rings[0].offer_chain(&[Readable(BUFFERS, 4)]);
        let outside = driver.rings[0].offer_chain(&[Readable(1 << 40, 4), Writable(RESPONSE, 4)]);
        run(&mut pmem, &driver);
        assert_eq!(driver.rings[0].all_used(), [(unknown, 4), (short, 4), (without_response, 0), (outside, 0)]);
        assert_eq!(driver.read(RESPONSE, 4), FAILED.to_le_bytes());
        assert_eq!(pmem.metrics(), [("flush_requests_total", 0), ("failed_requests_total", 4)]);
    }

    #[test]
    fn the_guest_is_told_where_it_is() {
        let (pmem, _) = active(true);
        let mut space = [0; 16];
        pmem.read_config(0, &mut space);
        assert_eq!(space[..8], (1_u64 << 32).to_le_bytes());
        assert_eq!(space[8..], ALIGNMENT.to_le_bytes());
    }

    #[test]
    fn what_is_written_to_a_read_only_image_stays_out_of_the_file() {
        let (mut file, image) = image(ALIGNMENT, true);
        file.write_all(b"content").unwrap();
        let memory = GuestMemory::from_regions(vec![image.unwrap().region(START).unwrap()]).unwrap();
        assert_eq!(memory.read_obj::<[u8; 7]>(START).unwrap(), *b"content");
        memory.write_slice(b"CHANGED", START).unwrap();
        let mut data = [0; 7];
        file.as_file().read_exact_at(&mut data, 0).unwrap();
        assert_eq!(&data, b"content");
    }

    #[test]
    fn what_is_written_to_a_writable_image_is_in_the_file() {
        let (file, image) = image(ALIGNMENT, false);
        let memory = GuestMemory::from_regions(vec![image.unwrap().region(START).unwrap()]).unwrap();
        memory.write_slice(b"changed", START).unwrap();
        let mut data = [0; 7];
        file.as_file().read_exact_at(&mut data, 0).unwrap();
        assert_eq!(&data, b"changed");
    }

    #[test]
    fn a_size_that_linux_cannot_map_is_refused() {
        let (file, image) = image(ALIGNMENT + 512, true);
        let path = file.path().display();
        assert_eq!(
            image.unwrap_err().to_string(),
            format!(
                "the pmem image {path} has 2097664 bytes, which is not a multiple of 2 MiB; `truncate -s 4M` makes it one"
            )
        );
    }
}
