//! The engine on a thread of its own, for hosts that have no io_uring: one operation after another.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Completion, Engine, IoVectors, MAX_IN_FLIGHT, Operation, PUNCH_HOLE, ZERO_RANGE};
use crate::memory::GuestMemory;

/// Enough for system calls and their errors.
const STACK_BYTES: usize = 64 * 1024;

pub struct Thread {
    /// `None` only while it is dropped.
    jobs: Option<mpsc::Sender<Job>>,
    completions: mpsc::Receiver<Completion>,
    /// Readable when there are completions.
    event: EventFd,
    thread: Option<JoinHandle<()>>,
    memory: GuestMemory,
    in_flight: usize,
}

struct Job {
    token: u64,
    call: Call,
}

/// An operation as a system call.
enum Call {
    Read { offset: i64, into: IoVectors },
    Write { offset: i64, from: IoVectors, flags: i32 },
    Flush,
    Allocate { mode: i32, offset: i64, len: i64 },
}

impl Thread {
    pub fn spawn(file: Arc<File>, memory: GuestMemory) -> io::Result<Self> {
        let (jobs, job_receiver) = mpsc::channel::<Job>();
        let (completion_sender, completions) = mpsc::channel();
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let done = event.try_clone()?;
        let work = move || {
            for Job { token, call } in job_receiver {
                // Neither fails while the engine is there; after that nobody listens.
                let _ = completion_sender.send(Completion::new(token, call.perform(&file)));
                let _ = done.write(1);
            }
        };
        let thread = thread::Builder::new().name("disk".into()).stack_size(STACK_BYTES).spawn(work)?;
        Ok(Self { jobs: Some(jobs), completions, event, thread: Some(thread), memory, in_flight: 0 })
    }
}

impl Engine for Thread {
    fn push(&mut self, token: u64, operation: Operation<'_>) -> io::Result<()> {
        if self.in_flight == MAX_IN_FLIGHT {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let call = Call::new(&self.memory, operation)?;
        let jobs = self.jobs.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        jobs.send(Job { token, call }).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        self.in_flight += 1;
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let completion = self.completions.try_recv().ok().or_else(|| {
            // What ended before this is found below, and what ends after it makes the descriptor readable again.
            let _ = self.event.read();
            self.completions.try_recv().ok()
        })?;
        self.in_flight -= 1;
        Some(completion)
    }

    fn descriptor(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // The thread ends with its last job.
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Call {
    fn new(memory: &GuestMemory, operation: Operation<'_>) -> io::Result<Self> {
        let position = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
        Ok(match operation {
            Operation::Read { offset, into } => {
                Self::Read { offset: position(offset)?, into: IoVectors::of(memory, into)? }
            }
            Operation::Write { offset, from, is_durable } => Self::Write {
                offset: position(offset)?,
                from: IoVectors::of(memory, from)?,
                flags: if is_durable { libc::RWF_DSYNC } else { 0 },
            },
            Operation::Flush => Self::Flush,
            Operation::Deallocate { offset, len } => {
                Self::Allocate { mode: PUNCH_HOLE, offset: position(offset)?, len: position(len)? }
            }
            Operation::WriteZeroes { offset, len } => {
                Self::Allocate { mode: ZERO_RANGE, offset: position(offset)?, len: position(len)? }
            }
        })
    }

    /// A count of bytes, or a negative error number.
    fn perform(&self, file: &File) -> i32 {
        loop {
            let result = self.call(file.as_raw_fd());
            let error = if result < 0 { io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) } else { 0 };
            match error {
                // One call transfers at most 0x7fff_f000 bytes, read(2).
                0 => return result as i32,
                libc::EINTR => {}
                error => return -error,
            }
        }
    }

    fn call(&self, file: RawFd) -> isize {
        match self {
            // SAFETY: the vectors point to guest memory, which the engine keeps mapped until this thread has ended.
            Self::Read { offset, into } => unsafe { libc::preadv(file, into.as_ptr(), into.len() as i32, *offset) },
            // SAFETY: as above.
            Self::Write { offset, from, flags } => unsafe {
                libc::pwritev2(file, from.as_ptr(), from.len() as i32, *offset, *flags)
            },
            // SAFETY: it touches no memory of ours.
            Self::Flush => unsafe { libc::fdatasync(file) as isize },
            // SAFETY: it touches no memory of ours.
            Self::Allocate { mode, offset, len } => unsafe { libc::fallocate(file, *mode, *offset, *len) as isize },
        }
    }
}
