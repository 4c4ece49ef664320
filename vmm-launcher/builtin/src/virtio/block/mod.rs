//! virtio-blk (virtio 1.2 §5.2): a disk whose content is a raw file or a block device.
//!
//! The bytes go straight between the page cache and guest memory. One queue: one thread serves all devices, and a second queue
//! would only make the guest's start longer.

mod config;
mod request;
#[cfg(test)]
mod tests;

use std::io;

use caisson_protocol::vmm;
use caisson_vmm_launcher::Result;
use slab::Slab;
use virtio_bindings::{
    virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP},
    virtio_ids::VIRTIO_ID_BLOCK,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use self::request::{Action, Refusal, Request};
use super::{
    Driver, Event, VirtioDevice, Watch,
    buffers::Segments,
    config_space,
    device::ActivateError,
    disk_io::{Completion, Engine, IoEngine, MAX_IN_FLIGHT, Means, Operation},
    image::Image,
    virtqueue::Virtqueue,
};
use crate::memory::GuestMemory;

/// Each entry holds a whole request, because descriptors are indirect.
const QUEUE_SIZES: [u16; 1] = [MAX_IN_FLIGHT as u16];

/// A disk.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    means: Means,
    active: Option<Active>,
}

/// What stays the same for all drivers.
#[derive(Debug)]
struct Disk {
    image: Image,
    /// Padded with zeroes.
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    counters: Counters,
}

/// See [`VirtioDevice::metrics`].
#[derive(Debug, Default)]
struct Counters {
    read_bytes: u64,
    read_requests: u64,
    written_bytes: u64,
    write_requests: u64,
    flush_requests: u64,
    /// Discards and write-zeroes.
    range_requests: u64,
    failed_requests: u64,
}

/// A disk with a driver.
#[derive(Debug)]
struct Active {
    // Dropped first: when it is gone, nothing touches guest memory any more.
    engine: Box<dyn Engine>,
    queue: Virtqueue,
    memory: GuestMemory,
    in_flight: Slab<InFlight>,
    /// The driver does not flush: each write ends on stable storage (virtio 1.2 §5.2.6.2).
    writes_through: bool,
}

/// A request whose I/O is under way, by the token of its operation.
#[derive(Debug)]
struct InFlight {
    head: u16,
    status: GuestAddress,
    action: Action,
    /// What is still to be read or written.
    data: Segments,
    /// How many bytes of data the request has. Not above 4 GiB: the length of a whole chain is not.
    bytes: u32,
}

impl Block {
    /// Opens, checks and locks the disk; the guest sees `id`, at most 20 bytes, as its serial number.
    ///
    /// # Errors
    /// As for [`Image::open`].
    pub fn open(id: &str, block: &vmm::Block, engine: IoEngine) -> Result<Self> {
        let image = Image::open("disk", &block.path, block.read_only)?;
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        serial.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        let disk = Disk { image, serial, counters: Counters::default() };
        Ok(Self { disk, means: Means::prepare(engine), active: None })
    }

    /// One pass: answers what has ended, starts what is available, and answers what ended at once.
    fn pass(&mut self) {
        let Some(active) = &mut self.active else { return };
        active.complete(&mut self.disk);
        active.start(&mut self.disk);
        active.submit();
        active.complete(&mut self.disk);
        active.queue.finish();
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        config::features(&self.disk.image)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&config::space(&self.disk.image), offset, data);
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        let memory = driver.memory.clone();
        let writes_through = driver.features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        let queue = Virtqueue::all(driver).into_iter().next().flatten().ok_or("the driver set up no queue")?;
        let engine = self.means.open(&self.disk.image.file, &memory)?;
        self.active = Some(Active { engine, queue, memory, in_flight: Slab::new(), writes_through });
        Ok(())
    }

    fn watches(&self) -> Vec<Watch> {
        let watch = |active: &Active| Watch { descriptor: active.engine.descriptor(), events: EventSet::IN, token: 0 };
        self.active.iter().map(watch).collect()
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
        let counters = &self.disk.counters;
        vec![
            ("read_bytes_total", counters.read_bytes),
            ("read_requests_total", counters.read_requests),
            ("written_bytes_total", counters.written_bytes),
            ("write_requests_total", counters.write_requests),
            ("flush_requests_total", counters.flush_requests),
            ("range_requests_total", counters.range_requests),
            ("failed_requests_total", counters.failed_requests),
        ]
    }
}

impl Active {
    /// Starts the available requests that there is room for.
    fn start(&mut self, disk: &mut Disk) {
        let Self { engine, queue, in_flight, writes_through, .. } = self;
        queue.serve(MAX_IN_FLIGHT - in_flight.len(), |memory, head, chain| {
            let request = match request::parse(&disk.image, memory, chain) {
                Ok(request) => request,
                Err(Refusal { code, status }) => {
                    disk.counters.failed_requests += 1;
                    return Some(answer(memory, status, code, 0));
                }
            };
            if request.action == Action::GetId {
                let written = request.data.write(memory, &disk.serial) as u32;
                return Some(answer(memory, Some(request.status), VIRTIO_BLK_S_OK as u8, written));
            }
            let status = request.status;
            let token = in_flight.insert(InFlight::new(head, request));
            match push(&mut **engine, token, &in_flight[token], *writes_through) {
                Ok(()) => None,
                Err(_) => {
                    in_flight.remove(token);
                    disk.counters.failed_requests += 1;
                    Some(answer(memory, Some(status), VIRTIO_BLK_S_IOERR as u8, 0))
                }
            }
        });
    }

    /// Answers the requests whose I/O has ended; one that was done in part goes on.
    fn complete(&mut self, disk: &mut Disk) {
        while let Some(completion) = self.engine.next_completion() {
            let token = completion.token as usize;
            let Some(code) = self.result(&completion) else { continue };
            let request = self.in_flight.remove(token);
            disk.counters.count(&request, code);
            let is_read = code == VIRTIO_BLK_S_OK as u8 && matches!(request.action, Action::Read { .. });
            let written = if is_read { request.bytes } else { 0 };
            let written = answer(&self.memory, Some(request.status), code, written);
            self.queue.complete(request.head, written);
        }
    }

    /// The status of the request that `completion` ends; `None` when it goes on.
    fn result(&mut self, completion: &Completion) -> Option<u8> {
        let token = completion.token as usize;
        let request = &mut self.in_flight[token];
        let done = match &completion.result {
            Ok(done) => u64::from(*done),
            // A file system that cannot make holes: what is discarded may stay as it is.
            Err(error) if is_unsupported(error) && matches!(request.action, Action::Discard { .. }) => 0,
            Err(error) if is_unsupported(error) => return Some(VIRTIO_BLK_S_UNSUPP as u8),
            Err(_) => return Some(VIRTIO_BLK_S_IOERR as u8),
        };
        if request.data.is_empty() || done == request.data.len() {
            return Some(VIRTIO_BLK_S_OK as u8);
        }
        // The image ends earlier than it did when it was opened.
        if done == 0 {
            return Some(VIRTIO_BLK_S_IOERR as u8);
        }
        request.advance(done);
        match push(&mut *self.engine, token, &self.in_flight[token], self.writes_through) {
            Ok(()) => {
                self.submit();
                None
            }
            Err(_) => Some(VIRTIO_BLK_S_IOERR as u8),
        }
    }

    fn submit(&mut self) {
        if self.engine.submit().is_err() {
            self.queue.serve_again();
        }
    }
}

impl InFlight {
    fn new(head: u16, request: Request) -> Self {
        let Request { action, data, status } = request;
        let bytes = data.len() as u32;
        Self { head, status, action, data, bytes }
    }

    /// Leaves what is still to do after `done` bytes.
    fn advance(&mut self, done: u64) {
        self.data.skip(done);
        if let Action::Read { offset } | Action::Write { offset } = &mut self.action {
            *offset += done;
        }
    }
}

impl Counters {
    fn count(&mut self, request: &InFlight, code: u8) {
        if code != VIRTIO_BLK_S_OK as u8 {
            self.failed_requests += 1;
            return;
        }
        let bytes = u64::from(request.bytes);
        match request.action {
            Action::Read { .. } => {
                self.read_requests += 1;
                self.read_bytes += bytes;
            }
            Action::Write { .. } => {
                self.write_requests += 1;
                self.written_bytes += bytes;
            }
            Action::Flush => self.flush_requests += 1,
            Action::Discard { .. } | Action::WriteZeroes { .. } => self.range_requests += 1,
            Action::GetId => {}
        }
    }
}

fn push(engine: &mut dyn Engine, token: usize, request: &InFlight, is_durable: bool) -> io::Result<()> {
    let operation = match request.action {
        Action::Read { offset } => Operation::Read { offset, into: request.data.as_slice() },
        Action::Write { offset } => Operation::Write { offset, from: request.data.as_slice(), is_durable },
        Action::Flush => Operation::Flush,
        Action::Discard { offset, len } | Action::WriteZeroes { offset, len, may_deallocate: true } => {
            Operation::Deallocate { offset, len }
        }
        Action::WriteZeroes { offset, len, may_deallocate: false } => Operation::WriteZeroes { offset, len },
        Action::GetId => return Err(io::ErrorKind::Unsupported.into()),
    };
    engine.push(token as u64, operation)
}

/// Writes the status of a request after `written` bytes of its data; answers how many bytes were written in all.
fn answer(memory: &GuestMemory, status: Option<GuestAddress>, code: u8, written: u32) -> u32 {
    match status {
        Some(address) if memory.write_obj(code, address).is_ok() => written.saturating_add(1),
        _ => 0,
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}
