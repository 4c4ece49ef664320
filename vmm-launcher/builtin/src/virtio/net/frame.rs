//! Guest memory that holds one frame, as the kernel takes it: data moves between the tap and guest memory without a copy of
//! our own.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use libc::{c_int, iovec};
use vm_memory::GuestMemoryBackend;

use crate::{memory::GuestMemory, virtio::buffers::Segments};

/// Pieces that one chain may add. Linux uses far fewer, and a few chains must fit into a call (`UIO_MAXIOV`, 1024).
const MAX_PIECES: usize = 256;

/// The memory of some chains, one after the other.
///
/// Invariant: every element lies in a mapping of `memory`, which keeps it mapped. It is guest memory, which nothing in this
/// process has a reference to.
pub struct FrameMemory {
    memory: GuestMemory,
    list: Vec<iovec>,
}

// SAFETY: the pointers are addresses in mappings that `memory` keeps, which belong to no thread.
unsafe impl Send for FrameMemory {}

impl FrameMemory {
    /// Nothing yet, of `memory`.
    pub fn new(memory: GuestMemory) -> Self {
        Self { memory, list: Vec::new() }
    }

    /// Pieces in it.
    pub fn pieces(&self) -> usize {
        self.list.len()
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// Takes the first `pieces` out.
    pub fn remove_front(&mut self, pieces: usize) {
        self.list.drain(..pieces);
    }

    /// Appends a chain's memory, and answers in how many pieces; none, and nothing is appended, when those are too many.
    pub fn push(&mut self, segments: &Segments) -> Option<usize> {
        let start = self.list.len();
        for segment in segments.as_slice() {
            for slice in self.memory.get_slices(segment.address, segment.len as usize) {
                let piece = slice.ok().filter(|_| self.list.len() < start + MAX_PIECES);
                let Some(piece) = piece else {
                    self.list.truncate(start);
                    return None;
                };
                self.list.push(iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() });
            }
        }
        Some(self.list.len() - start)
    }

    /// Writes `bytes` from `offset` on, as far as there is memory.
    pub fn write(&self, mut offset: usize, mut bytes: &[u8]) {
        for piece in &self.list {
            let skipped = offset.min(piece.iov_len);
            offset -= skipped;
            let (now, later) = bytes.split_at(bytes.len().min(piece.iov_len - skipped));
            for (at, byte) in (skipped..).zip(now) {
                // SAFETY: `at` is less than `iov_len`, so that the byte lies in a mapping (the type's invariant).
                unsafe { piece.iov_base.cast::<u8>().add(at).write_volatile(*byte) };
            }
            bytes = later;
        }
    }

    /// Receives one frame from `tap`; none when it was longer than the memory, and then it is lost.
    pub fn receive(&mut self, tap: BorrowedFd) -> io::Result<Option<usize>> {
        let mut surplus = 0u8;
        let room: usize = self.list.iter().map(|piece| piece.iov_len).sum();
        self.list.push(iovec { iov_base: (&raw mut surplus).cast(), iov_len: 1 });
        // SAFETY: the kernel writes only into the list's elements: guest memory that is mapped (the type's invariant), and
        // `surplus`, which outlives the call.
        let count = unsafe { libc::readv(tap.as_raw_fd(), self.list.as_ptr(), self.list.len() as c_int) };
        self.list.pop();
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        Ok((count <= room).then_some(count))
    }

    /// Sends all of the memory as one frame.
    pub fn send(&self, tap: BorrowedFd) -> io::Result<()> {
        // SAFETY: the kernel only reads the list's elements, which are guest memory that is mapped (the type's invariant).
        let count = unsafe { libc::writev(tap.as_raw_fd(), self.list.as_ptr(), self.list.len() as c_int) };
        if count < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
