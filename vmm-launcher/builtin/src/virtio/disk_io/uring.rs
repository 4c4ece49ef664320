//! The engine on io_uring: one system call for all that a pass over a queue brings.
//!
//! A ring does its work past the filter of system calls. So it is made before there is a filter, can do nothing but what a
//! disk needs, and serves one driver after the other: no thread that has submitted to the filter can make another.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, PoisonError},
};

use io_uring::{EnterFlags, IoUring, opcode, register::Restriction, squeue::Entry, types};

use super::{Completion, Engine, IoVectors, MAX_IN_FLIGHT, Operation, PUNCH_HOLE, ZERO_RANGE};
use crate::memory::GuestMemory;

/// Where a ring is between two drivers. It is there once, and not at all after one that the kernel did not take all
/// operations of.
#[derive(Clone)]
pub struct Home(Arc<Mutex<Option<IoUring>>>);

impl Home {
    /// A new ring, which may do nothing else than [`Uring`] has it do.
    ///
    /// # Errors
    /// When the kernel refuses it, or is older than Linux 5.10.
    pub fn build() -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(MAX_IN_FLIGHT as u32)?;
        let operations = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        ring.submitter().register_restrictions(&mut operations.map(Restriction::sqe_op))?;
        ring.submitter().register_enable_rings()?;
        Ok(Self(Arc::new(Mutex::new(Some(ring)))))
    }

    /// The ring itself.
    #[cfg(test)]
    pub fn take(&self) -> IoUring {
        self.exchange(None).expect("nobody has taken it")
    }

    fn exchange(&self, ring: Option<IoUring>) -> Option<IoUring> {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), ring)
    }
}

pub struct Uring {
    /// `None` only while it is dropped.
    ring: Option<IoUring>,
    home: Home,
    file: Arc<File>,
    /// Keeps mapped what the operations read and write.
    memory: GuestMemory,
    /// Of the operations that were pushed: the kernel copies them when they are submitted.
    vectors: Vec<IoVectors>,
    /// Pushed, and not completed.
    in_flight: usize,
}

impl Uring {
    /// With the ring that is at `home`, if there is one.
    pub fn new(home: &Home, file: Arc<File>, memory: GuestMemory) -> Option<Self> {
        let ring = Some(home.exchange(None)?);
        Some(Self { ring, home: home.clone(), file, memory, vectors: Vec::new(), in_flight: 0 })
    }

    fn ring(&mut self) -> &mut IoUring {
        self.ring.as_mut().expect("it has its ring until it is dropped")
    }

    fn entry(&mut self, operation: Operation<'_>) -> io::Result<Entry> {
        let file = types::Fd(self.file.as_raw_fd());
        Ok(match operation {
            Operation::Read { offset, into } => {
                let vectors = IoVectors::of(&self.memory, into)?;
                let entry = opcode::Readv::new(file, vectors.as_ptr(), vectors.len()).offset(offset).build();
                self.vectors.push(vectors);
                entry
            }
            Operation::Write { offset, from, is_durable } => {
                let vectors = IoVectors::of(&self.memory, from)?;
                let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
                let write = opcode::Writev::new(file, vectors.as_ptr(), vectors.len());
                self.vectors.push(vectors);
                write.offset(offset).rw_flags(flags).build()
            }
            Operation::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Deallocate { offset, len } => {
                opcode::Fallocate::new(file, len).offset(offset).mode(PUNCH_HOLE).build()
            }
            Operation::WriteZeroes { offset, len } => {
                opcode::Fallocate::new(file, len).offset(offset).mode(ZERO_RANGE).build()
            }
        })
    }
}

impl Engine for Uring {
    fn push(&mut self, token: u64, operation: Operation<'_>) -> io::Result<()> {
        if self.in_flight == MAX_IN_FLIGHT {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let entry = self.entry(operation)?.user_data(token);
        // SAFETY: the vectors are kept until the kernel has copied them, and `memory` keeps what they point to mapped until
        // the operation has completed, which `drop` waits for; `file` is open as long.
        unsafe { self.ring().submission().push(&entry) }.map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        self.in_flight += 1;
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        // More than once only where the kernel rejects one of them: it stops there.
        while !self.ring().submission().is_empty() {
            match self.ring().submit() {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        self.vectors.clear();
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let entry = self.ring().completion().next()?;
        self.in_flight -= 1;
        Some(Completion::new(entry.user_data(), entry.result()))
    }

    /// The ring's own: unlike an eventfd it is not readable for what was already taken, and needs no read.
    fn descriptor(&self) -> RawFd {
        self.ring.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let not_submitted = self.ring().submission().len();
        while self.in_flight > not_submitted {
            if self.next_completion().is_none() {
                // SAFETY: without an argument the kernel reads nothing of ours. Interrupted, it is called again.
                let _ = unsafe { self.ring().submitter().enter::<()>(0, 1, EnterFlags::GETEVENTS.bits(), None) };
            }
        }
        // The next driver must not carry out what is left of this one.
        let ring = self.ring.take().filter(|_| not_submitted == 0);
        self.home.exchange(ring);
    }
}
