//! virtio-rng (virtio 1.2 §5.4): random bytes from the host.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
};

use caisson_protocol::vmm;
use caisson_vmm_launcher::{Error, Result};
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_RNG,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::{Address, Bytes, GuestMemoryResult};

use super::{
    Driver, VirtioDevice,
    buffers::{Buffers, Segments},
    config_space,
    device::ActivateError,
    virtqueue::Virtqueue,
};
use crate::memory::GuestMemory;

/// The host kernel's generator: it never waits.
const KERNEL_SOURCE: &str = "/dev/urandom";

/// The most bytes that a request gets; a driver asks for 64 or so, and is owed one (virtio 1.2 §5.4.6.1).
const MAX_REQUEST_BYTES: u64 = 4096;

/// Linux has one request under way.
const QUEUE_SIZES: [u16; 1] = [16];

/// A source of random numbers.
#[derive(Debug)]
pub struct Rng {
    sources: Sources,
    queue: Option<Virtqueue>,
    given_bytes: u64,
}

#[derive(Debug)]
struct Sources {
    /// The one that was asked for.
    first: File,
    kernel: File,
}

impl Rng {
    /// A device that gives what the host's character device `rng.source` gives, by default /dev/urandom. While the source has
    /// nothing the host kernel's own generator helps out, so that the guest never waits.
    ///
    /// # Errors
    /// The source cannot be opened, or is no character device.
    pub fn open(rng: &vmm::Rng) -> Result<Self> {
        let path = if rng.source.is_empty() { KERNEL_SOURCE } else { &rng.source };
        let sources = Sources { first: open(path)?, kernel: open(KERNEL_SOURCE)? };
        Ok(Self { sources, queue: None, given_bytes: 0 })
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&[], offset, data);
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        self.queue = Virtqueue::all(driver).into_iter().next().flatten();
        Ok(())
    }

    fn queue_notified(&mut self, _queue: usize) {
        let Some(queue) = &mut self.queue else { return };
        queue.serve(usize::MAX, |memory, _, chain| {
            let buffers = Buffers::of(memory, chain);
            let given = buffers.map_or(0, |buffers| self.sources.fill(memory, &buffers.writable));
            self.given_bytes += u64::from(given);
            Some(given)
        });
        queue.finish();
    }

    fn reset(&mut self) {
        self.queue = None;
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![("given_bytes_total", self.given_bytes)]
    }
}

impl Sources {
    /// Fills the buffers of a request; answers how many bytes it got.
    fn fill(&mut self, memory: &GuestMemory, buffers: &Segments) -> u32 {
        let mut given = 0;
        for segment in buffers.as_slice() {
            let len = (MAX_REQUEST_BYTES - given).min(segment.len.into()) as usize;
            let mut fill = || -> GuestMemoryResult<()> {
                let first = memory.read_volatile_from(segment.address, &mut self.first, len).unwrap_or(0);
                let rest = segment.address.unchecked_add(first as u64);
                memory.read_exact_volatile_from(rest, &mut self.kernel, len - first)
            };
            if fill().is_err() {
                break;
            }
            given += len as u64;
        }
        given as u32
    }
}

fn open(path: &str) -> Result<File> {
    let refused = |source| Error::File { what: "source of entropy", path: path.into(), source };
    if !fs::metadata(path).map_err(refused)?.file_type().is_char_device() {
        return Err(Error::Invalid(format!("the source of entropy {path} is not a character device")));
    }
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::fake_driver::{
        BUFFERS, FakeDriver,
        Piece::{Readable, Writable},
    };

    fn rng(source: &str) -> Result<Rng> {
        Rng::open(&vmm::Rng { source: source.into(), ..vmm::Rng::default() })
    }

    fn active(source: &str) -> (Rng, FakeDriver) {
        let mut rng = rng(source).unwrap();
        let driver = FakeDriver::new(rng.queue_sizes());
        rng.activate(driver.driver(rng.features())).unwrap();
        (rng, driver)
    }

    #[test]
    fn a_request_is_filled_with_random_bytes() {
        let (mut rng, mut driver) = active("");
        let head = driver.rings[0].offer_chain(&[Writable(BUFFERS, 32), Writable(BUFFERS + 0x1000, 32)]);
        rng.queue_notified(0);
        assert_eq!(driver.rings[0].all_used(), [(head, 64)]);
        assert_ne!(driver.read(BUFFERS, 32), [0; 32]);
        assert_ne!(driver.read(BUFFERS + 0x1000, 32), driver.read(BUFFERS, 32));
        assert!(driver.was_interrupted());
        assert_eq!(rng.metrics(), [("given_bytes_total", 64)]);
    }

    #[test]
    fn a_source_that_has_nothing_is_helped_out() {
        // Always at its end.
        let (mut rng, mut driver) = active("/dev/null");
        let head = driver.rings[0].offer_chain(&[Writable(BUFFERS, 32)]);
        rng.queue_notified(0);
        assert_eq!(driver.rings[0].all_used(), [(head, 32)]);
        assert_ne!(driver.read(BUFFERS, 32), [0; 32]);
    }

    #[test]
    fn a_huge_request_gets_a_bounded_part() {
        let (mut rng, mut driver) = active("");
        let head = driver.rings[0].offer_chain(&[Writable(BUFFERS, 1 << 20)]);
        rng.queue_notified(0);
        assert_eq!(driver.rings[0].all_used(), [(head, 4096)]);
        assert_eq!(driver.read(BUFFERS + 4096, 4096), [0; 4096]);
    }

    #[test]
    fn a_request_with_no_room_gets_nothing() {
        let (mut rng, mut driver) = active("");
        let readable = driver.rings[0].offer_chain(&[Readable(BUFFERS, 32)]);
        let outside = driver.rings[0].offer_chain(&[Writable(1 << 40, 32)]);
        rng.queue_notified(0);
        assert_eq!(driver.rings[0].all_used(), [(readable, 0), (outside, 0)]);
    }

    #[test]
    fn after_a_reset_nothing_is_served() {
        let (mut rng, mut driver) = active("");
        rng.reset();
        driver.rings[0].offer_chain(&[Writable(BUFFERS, 32)]);
        rng.queue_notified(0);
        assert_eq!(driver.rings[0].all_used(), []);
    }

    #[test]
    fn a_source_that_is_no_device_is_refused() {
        assert_eq!(
            rng("/proc/version").unwrap_err().to_string(),
            "the source of entropy /proc/version is not a character device"
        );
    }
}
