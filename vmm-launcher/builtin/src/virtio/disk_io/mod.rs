//! I/O between a file and guest memory, in the background and without a copy.

mod thread;
mod uring;

use std::{fmt, fs::File, io, os::fd::RawFd, sync::Arc};

use serde::{Deserialize, Serialize};
use tracing::info;
use vm_memory::GuestMemoryBackend;

use self::{thread::Thread, uring::Uring};
use super::buffers::Segment;
use crate::memory::GuestMemory;

/// The most operations that an engine takes at a time.
pub const MAX_IN_FLIGHT: usize = 256;

/// How a disk's I/O is done.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoEngine {
    /// By io_uring, or by a thread where the kernel is too old for it or refuses it.
    #[default]
    Auto,
    /// By a thread for each disk, one operation after another.
    Thread,
}

/// Does I/O on one file in the background. Dropping it waits until nothing touches guest memory any more.
pub trait Engine: Send {
    /// Prepares `operation`; [`Self::submit`] starts it. The completion carries `token`.
    ///
    /// # Errors
    /// More than [`MAX_IN_FLIGHT`] are under way, or a buffer is not in guest memory.
    fn push(&mut self, token: u64, operation: Operation<'_>) -> io::Result<()>;

    /// Starts everything that was pushed.
    ///
    /// # Errors
    /// The kernel is short of memory: to be tried again.
    fn submit(&mut self) -> io::Result<()>;

    /// The next operation that has ended.
    fn next_completion(&mut self) -> Option<Completion>;

    /// Readable while there are completions.
    fn descriptor(&self) -> RawFd;
}

impl fmt::Debug for dyn Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("descriptor", &self.descriptor()).finish_non_exhaustive()
    }
}

/// What to do with the file. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// Reads into the segments, as far as the file goes.
    Read {
        /// In the file.
        offset: u64,
        /// Guest memory.
        into: &'a [Segment],
    },
    /// Writes the segments.
    Write {
        /// In the file.
        offset: u64,
        /// Guest memory.
        from: &'a [Segment],
        /// Whether it ends only when the data is on stable storage.
        is_durable: bool,
    },
    /// Brings all that was written to stable storage.
    Flush,
    /// Gives up the storage of a range, which reads as zeroes then.
    Deallocate {
        /// In the file.
        offset: u64,
        /// Not zero.
        len: u64,
    },
    /// Has a range read as zeroes and keeps its storage.
    WriteZeroes {
        /// In the file.
        offset: u64,
        /// Not zero.
        len: u64,
    },
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Completion {
    /// As it was pushed.
    pub token: u64,
    /// The number of bytes that were read or written, which may be fewer than wanted.
    pub result: io::Result<u32>,
}

impl Completion {
    /// From what a system call answers: a count, or a negative error number.
    fn new(token: u64, result: i32) -> Self {
        Self { token, result: u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg())) }
    }
}

/// What the engines of one disk are made of. It is made before the process is confined.
#[derive(Clone)]
pub struct Means(Option<uring::Home>);

impl Means {
    /// As `engine` says; what the kernel refuses is told in the log.
    pub fn prepare(engine: IoEngine) -> Self {
        let ring = match engine {
            IoEngine::Auto => uring::Home::build(),
            IoEngine::Thread => return Self(None),
        };
        if let Err(error) = &ring {
            info!(%error, "io_uring cannot be used; a thread does the disk's I/O");
        }
        Self(ring.ok())
    }

    /// An engine for `file`, whose operations read and write `memory`. The one before must be gone.
    ///
    /// # Errors
    /// The host lacks the resources.
    pub fn open(&self, file: &Arc<File>, memory: &GuestMemory) -> io::Result<Box<dyn Engine>> {
        let by_ring = self.0.as_ref().and_then(|home| Uring::new(home, file.clone(), memory.clone()));
        if let Some(engine) = by_ring {
            return Ok(Box::new(engine));
        }
        Ok(Box::new(Thread::spawn(file.clone(), memory.clone())?))
    }
}

impl fmt::Debug for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Means").field("ring", &self.0.is_some()).finish()
    }
}

/// Guest memory as the kernel wants it. It is valid as long as a handle to the guest's memory is held.
struct IoVectors(Box<[libc::iovec]>);

// SAFETY: the pointers are into guest memory, which any thread may access: it is never borrowed.
unsafe impl Send for IoVectors {}

impl IoVectors {
    fn of(memory: &GuestMemory, segments: &[Segment]) -> io::Result<Self> {
        let slices = segments.iter().flat_map(|segment| memory.get_slices(segment.address, segment.len as usize));
        let vectors = slices.map(|slice| {
            let slice = slice.map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            Ok(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
        });
        vectors.collect::<io::Result<_>>().map(Self)
    }

    fn as_ptr(&self) -> *const libc::iovec {
        self.0.as_ptr()
    }

    fn len(&self) -> u32 {
        // At most a request's segments, twice where each lies across two regions.
        self.0.len() as u32
    }
}

/// `fallocate(2)`'s modes of the two operations that write zeroes; neither changes the file's size.
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

#[cfg(test)]
mod tests {
    use std::os::{fd::BorrowedFd, unix::fs::FileExt};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const CHOICES: [IoEngine; 2] = [IoEngine::Auto, IoEngine::Thread];

    fn memory() -> GuestMemory {
        // Two regions that touch: a buffer may lie across them.
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)]).unwrap()
    }

    fn segment(address: u64, len: u32) -> Segment {
        Segment { address: GuestAddress(address), len }
    }

    fn complete_one(engine: &mut dyn Engine) -> Completion {
        engine.submit().unwrap();
        loop {
            if let Some(completion) = engine.next_completion() {
                return completion;
            }
            // SAFETY: the engine owns the descriptor and outlives the call.
            let descriptor = unsafe { BorrowedFd::borrow_raw(engine.descriptor()) };
            let timeout = PollTimeout::from(10_000_u16);
            assert_eq!(poll(&mut [PollFd::new(descriptor, PollFlags::POLLIN)], timeout), Ok(1), "no completion");
        }
    }

    fn reads_and_writes(choice: IoEngine) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let memory = memory();
        let mut engine = Means::prepare(choice).open(&file, &memory).unwrap();

        memory.write_slice(&[7; 0x800], GuestAddress(0x3c00)).unwrap();
        let from = [segment(0x3c00, 0x600), segment(0x4200, 0x200)];
        engine.push(1, Operation::Write { offset: 0x1000, from: &from, is_durable: true }).unwrap();
        let completion = complete_one(&mut *engine);
        assert_eq!((completion.token, completion.result.unwrap()), (1, 0x800));

        engine.push(2, Operation::Read { offset: 0x1400, into: &[segment(0, 0x1000)] }).unwrap();
        assert_eq!(complete_one(&mut *engine).result.unwrap(), 0x400, "as far as the file goes");
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0x3fc)).unwrap(), [7; 4]);

        engine.push(3, Operation::Deallocate { offset: 0x1000, len: 0x400 }).unwrap();
        complete_one(&mut *engine).result.unwrap();
        let mut data = [1; 0x800];
        file.read_exact_at(&mut data, 0x1000).unwrap();
        assert_eq!((data[0x3ff], data[0x400]), (0, 7));

        engine.push(4, Operation::Flush).unwrap();
        complete_one(&mut *engine).result.unwrap();
        assert!(engine.next_completion().is_none());
    }

    #[test]
    fn io_uring_reads_and_writes() {
        reads_and_writes(IoEngine::Auto);
    }

    #[test]
    fn a_thread_reads_and_writes() {
        reads_and_writes(IoEngine::Thread);
    }

    #[test]
    fn a_buffer_outside_memory_is_refused() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        for choice in CHOICES {
            let mut engine = Means::prepare(choice).open(&file, &memory()).unwrap();
            let error = engine.push(1, Operation::Read { offset: 0, into: &[segment(0x7fff, 2)] }).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        }
    }

    #[test]
    fn an_error_of_the_kernel_is_told() {
        let file = Arc::new(File::open("/dev/null").unwrap());
        for choice in CHOICES {
            let mut engine = Means::prepare(choice).open(&file, &memory()).unwrap();
            engine.push(1, Operation::Write { offset: 0, from: &[segment(0, 1)], is_durable: false }).unwrap();
            assert_eq!(complete_one(&mut *engine).result.unwrap_err().raw_os_error(), Some(libc::EBADF));
        }
    }

    #[test]
    fn dropping_waits_for_what_is_under_way() {
        for choice in CHOICES {
            let file = Arc::new(tempfile::tempfile().unwrap());
            let memory = memory();
            memory.write_slice(&[7; 0x4000], GuestAddress(0)).unwrap();
            let mut engine = Means::prepare(choice).open(&file, &memory).unwrap();
            let from = [segment(0, 0x4000)];
            let write = |index| Operation::Write { offset: index * 0x4000, from: &from, is_durable: true };
            (0..64).for_each(|index| engine.push(index, write(index)).unwrap());
            engine.submit().unwrap();
            drop(engine);
            let mut data = vec![0; 64 * 0x4000];
            file.read_exact_at(&mut data, 0).unwrap();
            assert!(data.iter().all(|&byte| byte == 7));
            assert_eq!(Arc::strong_count(&file), 1, "the engine is gone");
        }
    }

    #[test]
    fn what_was_pushed_and_not_submitted_is_forgotten() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut engine = Means::prepare(IoEngine::Auto).open(&file, &memory()).unwrap();
        engine.push(1, Operation::Write { offset: 0, from: &[segment(0, 16)], is_durable: false }).unwrap();
        drop(engine);
        assert_eq!(file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn one_ring_serves_one_driver_after_the_other() {
        let (file, memory) = (Arc::new(tempfile::tempfile().unwrap()), memory());
        let means = Means::prepare(IoEngine::Auto);
        memory.write_slice(&[7; 16], GuestAddress(0)).unwrap();
        for round in 0..3 {
            let mut engine = means.open(&file, &memory).unwrap();
            let write = Operation::Write { offset: round * 16, from: &[segment(0, 16)], is_durable: false };
            engine.push(round, write).unwrap();
            assert_eq!(complete_one(&mut *engine).token, round);
        }
        assert_eq!(file.metadata().unwrap().len(), 48);
    }

    #[test]
    fn what_one_driver_did_not_submit_the_next_does_not_either() {
        let (file, memory) = (Arc::new(tempfile::tempfile().unwrap()), memory());
        let means = Means::prepare(IoEngine::Auto);
        let from = [segment(0, 16)];
        let write = |offset| Operation::Write { offset, from: &from, is_durable: false };
        let mut engine = means.open(&file, &memory).unwrap();
        engine.push(1, write(4096)).unwrap();
        drop(engine);
        let mut engine = means.open(&file, &memory).unwrap();
        engine.push(2, write(0)).unwrap();
        assert_eq!(complete_one(&mut *engine).token, 2);
        assert_eq!(file.metadata().unwrap().len(), 16);
    }

    #[test]
    fn a_ring_does_nothing_but_a_disks_work() {
        use io_uring::{opcode, types};
        let Ok(home) = uring::Home::build() else { return };
        let mut ring = home.take();
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build();
        // SAFETY: the path is static.
        unsafe { ring.submission().push(&open) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), -libc::EACCES);
    }
}
