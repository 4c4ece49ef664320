//! virtio-balloon (virtio 1.2 §5.5): takes memory from the guest and gives it back, and frees what the guest does not use.
//!
//! The guest's statistics are not asked for: its agent tells more.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, Ordering},
};

use caisson_protocol::vmm;
use nix::fcntl::{FallocateFlags, fallocate};
use tokio::sync::watch;
use tracing::debug;
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_BALLOON,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{
    Driver, Interrupt, VirtioDevice,
    buffers::{Buffers, Segment, Segments},
    config_space,
    device::ActivateError,
    virtqueue::{Chain, Virtqueue},
};
use crate::memory::GuestMemory;

/// The unit of the balloon's size and of page numbers in bytes, whatever the guest's pages are (virtio 1.2 §5.5.6).
const PAGE_BYTES: u64 = 4096;

/// The most pages that one request may name; Linux names 256.
const MAX_PAGES: usize = 1024;

/// Features, virtio 1.2 §5.5.3.
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Inflate, deflate, and three of which reporting is one: the specification numbers it 4, and drivers that leave out the queues
/// of the features that we do not have number it 2. It is the last that the driver sets up, either way.
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// `struct virtio_balloon_config`: the size that is wanted, and the size that it has, in pages.
const ACTUAL_OFFSET: u64 = 4;

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    reports_free_pages: bool,
    wanted: Arc<Wanted>,
    /// Its size in pages, as the guest says. There is no control any more when it is dropped.
    actual: watch::Sender<u32>,
    active: Option<Active>,
    counters: Counters,
}

/// The host's hold of a balloon.
#[derive(Clone, Debug)]
pub struct BalloonControl {
    wanted: Arc<Wanted>,
    actual: watch::Receiver<u32>,
}

/// What the balloon is told by its control.
#[derive(Debug, Default)]
struct Wanted {
    /// In pages.
    target: AtomicU32,
    /// Of the driver, while there is one.
    interrupt: Mutex<Option<Interrupt>>,
}

/// A balloon with a driver.
#[derive(Debug)]
struct Active {
    queues: Vec<Option<Virtqueue>>,
    /// Where free pages are reported.
    reporting: Option<usize>,
}

#[derive(Debug, Default)]
struct Counters {
    inflated_bytes: u64,
    deflated_bytes: u64,
    reported_bytes: u64,
}

impl Balloon {
    /// An empty balloon, and the host's hold of it.
    pub fn new(balloon: &vmm::Balloon) -> (Self, BalloonControl) {
        let wanted = Arc::<Wanted>::default();
        let (actual, receiver) = watch::channel(0);
        let control = BalloonControl { wanted: wanted.clone(), actual: receiver };
        let reports_free_pages = balloon.free_page_reporting;
        (Self { reports_free_pages, wanted, actual, active: None, counters: Counters::default() }, control)
    }
}

impl BalloonControl {
    /// Has the guest give up `bytes` of its memory in all, rounded down to pages. It does as soon as it can, as far as it can.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.wanted.target.store(pages, Ordering::SeqCst);
        if let Some(interrupt) = &*self.wanted.interrupt() {
            interrupt.config_changed();
        }
    }

    /// How much the guest has given up, as it says, in bytes.
    pub fn actual(&self) -> u64 {
        in_bytes(*self.actual.borrow())
    }

    /// Answers when the guest has given up what is wanted, and no more; or when the balloon is gone.
    pub async fn settled(&mut self) {
        let _ = self.actual.wait_for(|actual| *actual == self.wanted.target.load(Ordering::SeqCst)).await;
    }
}

fn in_bytes(pages: u32) -> u64 {
    u64::from(pages) * PAGE_BYTES
}

impl Wanted {
    fn interrupt(&self) -> MutexGuard<'_, Option<Interrupt>> {
        self.interrupt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        let reporting = if self.reports_free_pages { PAGE_REPORTING } else { 0 };
        DEFLATE_ON_OOM | reporting | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        if self.reports_free_pages { &QUEUE_SIZES } else { &QUEUE_SIZES[..=DEFLATE] }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let target = self.wanted.target.load(Ordering::SeqCst);
        let sizes = [target, *self.actual.borrow()].map(u32::to_le_bytes);
        config_space::read(sizes.as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(actual)) = (offset, data.try_into()) {
            self.actual.send_replace(u32::from_le_bytes(actual));
        }
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        *self.wanted.interrupt() = Some(driver.interrupt.clone());
        let accepts_reporting = driver.features & PAGE_REPORTING != 0;
        let queues = Virtqueue::all(driver);
        let last = queues.iter().rposition(Option::is_some);
        let reporting = last.filter(|&last| accepts_reporting && last > DEFLATE);
        self.active = Some(Active { queues, reporting });
        Ok(())
    }

    fn queue_notified(&mut self, queue: usize) {
        let Some(Active { queues, reporting }) = &mut self.active else { return };
        let reports = Some(queue) == *reporting;
        let Some(Some(virtqueue)) = queues.get_mut(queue) else { return };
        virtqueue.serve(usize::MAX, |memory, _, chain| {
            match queue {
                INFLATE => self.counters.inflated_bytes += inflate(memory, chain),
                // The guest takes the pages back by touching them.
                DEFLATE => self.counters.deflated_bytes += named_bytes(memory, chain),
                _ if reports => self.counters.reported_bytes += free_reported(memory, chain),
                _ => {}
            }
            Some(0)
        });
        virtqueue.finish();
    }

    fn reset(&mut self) {
        self.active = None;
        *self.wanted.interrupt() = None;
        self.actual.send_replace(0);
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("target_bytes", in_bytes(self.wanted.target.load(Ordering::SeqCst))),
            ("actual_bytes", in_bytes(*self.actual.borrow())),
            ("inflated_bytes_total", self.counters.inflated_bytes),
            ("deflated_bytes_total", self.counters.deflated_bytes),
            ("reported_bytes_total", self.counters.reported_bytes),
        ]
    }
}

/// Frees the pages whose numbers the request holds, neighbours together; answers how many bytes that are.
fn inflate(memory: &GuestMemory, chain: Chain<'_>) -> u64 {
    let Some(Buffers { readable, .. }) = Buffers::of(memory, chain) else { return 0 };
    let mut pages = page_numbers(memory, readable);
    pages.sort_unstable();
    pages.dedup();
    let runs = pages.chunk_by(|page, next| page.checked_add(1) == Some(*next));
    let run = |run: &[u32]| free(memory, GuestAddress(u64::from(run[0]) * PAGE_BYTES), run.len() as u64 * PAGE_BYTES);
    runs.map(run).sum()
}

fn named_bytes(memory: &GuestMemory, chain: Chain<'_>) -> u64 {
    Buffers::of(memory, chain).map_or(0, |buffers| buffers.readable.len() / size_of::<u32>() as u64 * PAGE_BYTES)
}

/// Frees the buffers themselves: pages that the guest does not use now.
fn free_reported(memory: &GuestMemory, chain: Chain<'_>) -> u64 {
    let Some(Buffers { writable, .. }) = Buffers::of(memory, chain) else { return 0 };
    writable.as_slice().iter().map(|Segment { address, len }| free(memory, *address, u64::from(*len))).sum()
}

/// The page numbers in a request, at most [`MAX_PAGES`]: pages beyond that stay where they are.
fn page_numbers(memory: &GuestMemory, mut buffers: Segments) -> Vec<u32> {
    let count = MAX_PAGES.min(buffers.len() as usize / size_of::<u32>());
    let mut numbers = vec![0; count * size_of::<u32>()];
    if !buffers.take(memory, &mut numbers) {
        return Vec::new();
    }
    numbers.as_chunks().0.iter().map(|number| u32::from_le_bytes(*number)).collect()
}

/// Gives the whole pages of a range back to the host, as far as the range is memory; answers how many bytes that are.
fn free(memory: &GuestMemory, address: GuestAddress, len: u64) -> u64 {
    let end = address.0.saturating_add(len) / PAGE_BYTES * PAGE_BYTES;
    let mut start = address.0.next_multiple_of(PAGE_BYTES);
    let mut freed = 0;
    while let Some((region, offset)) = memory.to_region_addr(GuestAddress(start)).filter(|_| start < end) {
        let len = (end - start).min(region.len() - offset.0);
        match free_in_region(region, offset.0, len) {
            Ok(()) => freed += len,
            Err(error) => debug!(%error, start, len, "memory stays with the guest"),
        }
        start += len;
    }
    freed
}

fn free_in_region(region: &vm_memory::GuestRegionMmap<()>, offset: u64, len: u64) -> nix::Result<()> {
    match region.file_offset() {
        // Only from the file itself can pages of a shared mapping be freed.
        Some(backing) if region.flags() & libc::MAP_SHARED != 0 => {
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(backing.file(), mode, (backing.start() + offset) as i64, len as i64)
        }
        // The file behind a private mapping is somebody else's too.
        _ => {
            let start = region.as_ptr().wrapping_add(offset as usize);
            // SAFETY: the range is inside the region's mapping, which is guest memory: never borrowed, and its content is the
            // guest's to give up.
            let result = unsafe { libc::madvise(start.cast(), len as usize, libc::MADV_DONTNEED) };
            nix::errno::Errno::result(result).map(drop)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, FileOffset};

    use super::*;
    use crate::virtio::fake_driver::{
        BUFFERS, FakeDriver, MEMORY_SIZE,
        Piece::{Readable, Writable},
    };

    const PAGE: u64 = BUFFERS + 0x10_0000;

    fn active(free_page_reporting: bool) -> (Balloon, BalloonControl, FakeDriver) {
        let (mut balloon, control) = Balloon::new(&vmm::Balloon { free_page_reporting, ..vmm::Balloon::default() });
        let driver = FakeDriver::new(balloon.queue_sizes());
        balloon.activate(driver.driver(balloon.features())).unwrap();
        (balloon, control, driver)
    }

    fn name_pages(driver: &FakeDriver, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        driver.write(BUFFERS, &bytes);
    }

    #[test]
    fn inflating_frees_the_pages_that_are_named_and_no_other() {
        let (mut balloon, _, mut driver) = active(false);
        driver.write(PAGE, &[7; 4 * 4096]);
        let first = (PAGE / 4096) as u32;
        name_pages(&driver, &[first + 2, first, first + 2]);
        let head = driver.rings[INFLATE].offer_chain(&[Readable(BUFFERS, 12)]);
        balloon.queue_notified(INFLATE);
        assert_eq!(driver.rings[INFLATE].all_used(), [(head, 0)]);
        let content = [0, 1, 2, 3].map(|page| driver.read(PAGE + page * 4096, 1)[0]);
        assert_eq!(content, [0, 7, 0, 7]);
    }

    #[test]
    fn shared_memory_is_freed_in_its_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let range = (GuestAddress(0), 1 << 20, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        let memory = GuestMemory::from_ranges_with_files([range]).unwrap();
        memory.write_slice(&vec![7; 1 << 20], GuestAddress(0)).unwrap();
        let before = file.metadata().unwrap().blocks();
        assert_eq!(free(&memory, GuestAddress(0), 1 << 19), 1 << 19);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(1 << 19)).unwrap(), 7);
        assert!(file.metadata().unwrap().blocks() <= before / 2 + 8);
    }

    #[test]
    fn only_whole_pages_of_memory_are_freed() {
        let (_, _, driver) = active(false);
        driver.write(PAGE, &[7; 3 * 4096]);
        assert_eq!(free(&driver.memory, GuestAddress(PAGE + 1), 2 * 4096), 4096);
        assert_eq!([0, 1, 2].map(|page| driver.read(PAGE + page * 4096, 1)[0]), [7, 0, 7]);
        assert_eq!(free(&driver.memory, GuestAddress(MEMORY_SIZE - 4096), 1 << 40), 4096);
        assert_eq!(free(&driver.memory, GuestAddress(u64::MAX - 4095), 4096), 0);
    }

    #[test]
    fn pages_that_do_not_exist_are_ignored() {
        let (mut balloon, _, mut driver) = active(false);
        name_pages(&driver, &[u32::MAX, (MEMORY_SIZE / 4096) as u32]);
        let head = driver.rings[INFLATE].offer_chain(&[Readable(BUFFERS, 8)]);
        let odd = driver.rings[INFLATE].offer_chain(&[Readable(BUFFERS, 3)]);
        let huge = driver.rings[INFLATE].offer_chain(&[Readable(PAGE, 1 << 20)]);
        let outside = driver.rings[INFLATE].offer_chain(&[Readable(1 << 40, 4)]);
        balloon.queue_notified(INFLATE);
        assert_eq!(driver.rings[INFLATE].all_used(), [head, odd, huge, outside].map(|head| (head, 0)));
    }

    #[test]
    fn reported_pages_are_freed_whichever_number_their_queue_has() {
        for queue in [2, 4] {
            let (mut balloon, _) = Balloon::new(&vmm::Balloon { free_page_reporting: true, ..vmm::Balloon::default() });
            let mut driver = FakeDriver::new(&QUEUE_SIZES);
            let mut device_side = driver.driver(balloon.features());
            let is_set_up = |index: usize| index <= DEFLATE || index == queue;
            let queues = device_side.queues.iter_mut().enumerate();
            queues.for_each(|(index, queue)| virtio_queue::QueueT::set_ready(queue, is_set_up(index)));
            balloon.activate(device_side).unwrap();

            driver.write(PAGE, &[7; 2 * 4096]);
            let head = driver.rings[queue].offer_chain(&[Writable(PAGE, 4096)]);
            balloon.queue_notified(queue);
            assert_eq!(driver.rings[queue].all_used(), [(head, 0)]);
            assert_eq!([0, 1].map(|page| driver.read(PAGE + page * 4096, 1)[0]), [0, 7]);
        }
    }

    #[test]
    fn the_target_is_told_and_the_size_is_heard() {
        let (mut balloon, control, driver) = active(false);
        control.set_target(3 * 4096 + 1);
        assert!(driver.was_interrupted());
        let mut target = [0; 4];
        balloon.read_config(0, &mut target);
        assert_eq!(u32::from_le_bytes(target), 3);

        balloon.write_config(ACTUAL_OFFSET, &2_u32.to_le_bytes());
        assert_eq!(control.actual(), 2 * 4096);
        balloon.write_config(ACTUAL_OFFSET, &[1]);
        balloon.write_config(0, &[9; 4]);
        assert_eq!(control.actual(), 2 * 4096, "what is no size changes nothing");
    }

    #[tokio::test]
    async fn who_waits_for_the_size_is_told_of_it_and_of_the_balloons_end() {
        let (mut balloon, mut control, _driver) = active(false);
        control.settled().await;
        control.set_target(2 * 4096);
        let ((), ()) = tokio::join!(control.settled(), async {
            balloon.write_config(ACTUAL_OFFSET, &1_u32.to_le_bytes());
            tokio::task::yield_now().await;
            balloon.write_config(ACTUAL_OFFSET, &2_u32.to_le_bytes());
        });
        assert_eq!(control.actual(), 2 * 4096);
        control.set_target(3 * 4096);
        let ((), ()) = tokio::join!(control.settled(), async { drop(balloon) });
    }

    #[test]
    fn without_a_driver_the_target_waits() {
        let (mut balloon, control) = Balloon::new(&vmm::Balloon::default());
        control.set_target(4096);
        let driver = FakeDriver::new(balloon.queue_sizes());
        balloon.activate(driver.driver(balloon.features())).unwrap();
        balloon.reset();
        control.set_target(8192);
        assert!(!driver.was_interrupted());
    }

    #[test]
    fn deflating_is_counted() {
        let (mut balloon, _, mut driver) = active(true);
        let head = driver.rings[DEFLATE].offer_chain(&[Readable(BUFFERS, 8)]);
        balloon.queue_notified(DEFLATE);
        assert_eq!(driver.rings[DEFLATE].all_used(), [(head, 0)]);
        assert!(balloon.metrics().contains(&("deflated_bytes_total", 8192)));
    }
}
