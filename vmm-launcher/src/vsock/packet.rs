//! Vsock packets: the header (virtio 1.2 §5.10.6) and the guest memory that carries it.
//!
//! The `virtio-vsock` crate is not used: it accepts one data descriptor only, whereas Linux sends
//! zero-copy data in several, and it gives no header for a chain that is bad, so that the
//! connection could not be reset.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::{GuestMemory, Permissions, VolatileMemoryError, VolatileSlice};
use vm_memory::{ReadVolatile, WriteVolatile};

/// Size of a packet header in bytes.
pub const HEADER_SIZE: usize = 44;
/// Descriptors in a chain that are worth following; Linux uses 18 at most.
const MAX_DESCRIPTORS: usize = 256;
/// The only socket type that we offer (`VIRTIO_VSOCK_TYPE_STREAM`).
pub const TYPE_STREAM: u16 = 1;
/// `SHUTDOWN` flag: the sender of the packet will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `SHUTDOWN` flag: the sender of the packet will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet asks for (`VIRTIO_VSOCK_OP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Open a connection.
    Request = 1,
    /// The connection is accepted.
    Response = 2,
    /// The connection is refused, broken or, after `Shutdown`, closed.
    Reset = 3,
    /// One or both directions end.
    Shutdown = 4,
    /// Bytes.
    ReadWrite = 5,
    /// Only the credit fields matter.
    CreditUpdate = 6,
    /// Please send a `CreditUpdate`.
    CreditRequest = 7,
}

impl Operation {
    /// The operation with this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet header, read once from guest memory and never looked at there again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Socket type, [`TYPE_STREAM`].
    pub socket_type: u16,
    /// An [`Operation`], by number.
    pub operation: u16,
    /// Shutdown flags.
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender's application has taken out of that buffer, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes the little-endian fields.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        fn field<const N: usize>(bytes: &[u8; HEADER_SIZE], at: usize) -> [u8; N] {
            std::array::from_fn(|i| bytes[at + i])
        }
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            operation: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Encodes the little-endian fields.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The guest memory of one descriptor chain, in order, however the driver cut it up: virtio 1.2
/// §2.7.4.1 forbids a device to care.
pub struct Buffer<'a, B: BitmapSlice> {
    slices: Vec<VolatileSlice<'a, B>>,
    len: usize,
}

impl<'a, B: BitmapSlice> Buffer<'a, B> {
    /// A buffer over memory that is not described by a chain.
    pub fn new(slices: Vec<VolatileSlice<'a, B>>) -> Self {
        let len = slices.iter().map(|slice| slice.len()).sum();
        Self { slices, len }
    }

    /// Bytes in the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Takes the packet header off the front; `None` when the buffer is too short for one.
    pub fn take_header(&mut self) -> Option<Header> {
        let front = self.take_front(HEADER_SIZE)?;
        let mut bytes = [0; HEADER_SIZE];
        let mut at = 0;
        for slice in &front.slices {
            at += slice.copy_to(&mut bytes[at..]);
        }
        Some(Header::from_bytes(&bytes))
    }

    /// Overwrites the buffer with a packet header.
    pub fn put_header(&self, header: Header) {
        let bytes = header.to_bytes();
        let mut at = 0;
        for slice in &self.slices {
            slice.copy_from(&bytes[at..]);
            at = bytes.len().min(at + slice.len());
        }
    }

    /// Splits the first `count` bytes off; `None`, and no change, when there are fewer.
    pub fn take_front(&mut self, count: usize) -> Option<Self> {
        let rest = self.len.checked_sub(count)?;
        let mut front = Vec::with_capacity(1);
        let mut back = Vec::with_capacity(self.slices.len());
        let mut missing = count;
        for slice in self.slices.drain(..) {
            let cut = missing.min(slice.len());
            missing -= cut;
            // `cut` is within the slice, so that neither half can fail.
            let (head, tail) = slice.split_at(cut).ok()?;
            front.extend((!head.is_empty()).then_some(head));
            back.extend((!tail.is_empty()).then_some(tail));
        }
        *self = Self { slices: back, len: rest };
        Some(Self { slices: front, len: count })
    }

    /// Reads what `socket` has, at most `limit` bytes; 0 is the end of the stream.
    pub fn read_from(&self, mut socket: &UnixStream, limit: usize) -> io::Result<usize> {
        let mut done = 0;
        for slice in &self.slices {
            let wanted = slice.len().min(limit - done);
            if wanted == 0 {
                break;
            }
            let mut part = slice.subslice(0, wanted).map_err(io::Error::other)?;
            let count = loop {
                match socket.read_volatile(&mut part).map_err(io_error) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => break result,
                }
            };
            match count {
                Ok(count) => {
                    done += count;
                    if count < wanted {
                        break;
                    }
                }
                // What came before this slice counts; the next call meets the error again.
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Writes as much as `socket` takes without blocking, and says how much that was. Relies on
    /// `SIGPIPE` being ignored, as Rust programs start.
    pub fn write_to(&self, mut socket: &UnixStream) -> io::Result<usize> {
        let mut done = 0;
        for slice in &self.slices {
            let mut at = 0;
            while at < slice.len() {
                let part = slice.offset(at).map_err(io::Error::other)?;
                match socket.write_volatile(&part).map_err(io_error) {
                    Ok(0) => return Ok(done + at),
                    Ok(count) => at += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(done + at);
                    }
                    Err(error) => return Err(error),
                }
            }
            done += at;
        }
        Ok(done)
    }

    /// Copies everything after the first `skip` bytes to the end of `queue`.
    pub fn append_to(&self, queue: &mut VecDeque<u8>, mut skip: usize) {
        queue.reserve(self.len.saturating_sub(skip));
        let mut chunk = [0; 4096];
        for slice in &self.slices {
            let mut at = skip.min(slice.len());
            skip -= at;
            while let Ok(rest) = slice.offset(at)
                && !rest.is_empty()
            {
                let count = rest.copy_to(&mut chunk);
                queue.extend(&chunk[..count]);
                at += count;
            }
        }
    }
}

impl<'a, B: BitmapSlice> Buffer<'a, B> {
    /// The memory of a chain whose descriptors must all have the direction `access`; `None` when
    /// one has the other, or lies outside guest memory, or there are too many.
    pub fn from_chain<M>(memory: &'a M, chain: DescriptorChain<&'a M>, access: Permissions) -> Option<Self>
    where
        M: GuestMemory,
        M::Bitmap: vm_memory::bitmap::WithBitmapSlice<'a, S = B>,
    {
        let mut slices: Vec<VolatileSlice<'a, BS<'a, M::Bitmap>>> = Vec::with_capacity(2);
        for (index, descriptor) in chain.enumerate() {
            if index == MAX_DESCRIPTORS || descriptor.is_write_only() != (access == Permissions::Write) {
                return None;
            }
            let length = descriptor.len() as usize;
            for slice in memory.get_slices(descriptor.addr(), length, access).ok()? {
                slices.push(slice.ok()?);
            }
        }
        Some(Self::new(slices))
    }
}

fn io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        other => io::Error::other(other),
    }
}
