//! What a driver asks of a disk (virtio 1.2 §5.2.6): parsed and checked here, once.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestAddress;

use crate::{
    memory::GuestMemory,
    virtio::{
        buffers::{Buffers, Segments},
        image::{Image, SECTOR_BYTES},
        virtqueue::Chain,
    },
};

/// The most sectors that one discard or write-zeroes may name: 2 GiB.
pub const MAX_RANGE_SECTORS: u32 = 0x40_0000;

/// `struct virtio_blk_req`: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE_BYTES: usize = 16;

/// A request that can be carried out on the disk that it was parsed for.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub action: Action,
    /// The guest memory to read into or to write from; empty for the others.
    pub data: Segments,
    /// Where the status byte goes.
    pub status: GuestAddress,
}

/// What to do. Offsets and lengths are in bytes and on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read into the data.
    Read { offset: u64 },
    /// Write the data.
    Write { offset: u64 },
    /// Bring everything that was written to stable storage.
    Flush,
    /// The range's content is not needed any more.
    Discard { offset: u64, len: u64 },
    /// The range reads as zeroes from now on; whether its storage may be given up.
    WriteZeroes { offset: u64, len: u64, may_deallocate: bool },
    /// Write the disk's serial number into the data.
    GetId,
}

/// A request that is not carried out.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the driver is told, a `VIRTIO_BLK_S_*`.
    pub code: u8,
    /// Where; `None` where the request has no room for it.
    pub status: Option<GuestAddress>,
}

/// Parses the request in `chain` and checks it against `image`.
pub fn parse(image: &Image, memory: &GuestMemory, chain: Chain<'_>) -> Result<Request, Refusal> {
    let without_status = Refusal { code: VIRTIO_BLK_S_IOERR as u8, status: None };
    let Some(Buffers { mut readable, mut writable }) = Buffers::of(memory, chain) else { return Err(without_status) };
    let Some(status) = writable.take_last_byte() else { return Err(without_status) };
    let refusal = |code| Refusal { code: code as u8, status: Some(status) };

    let mut header = [0; HEADER_BYTES];
    if !readable.take(memory, &mut header) {
        return Err(refusal(VIRTIO_BLK_S_IOERR));
    }
    let kind = u32_at(&header, 0);
    let changes_disk = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
    if changes_disk && image.is_read_only {
        return Err(refusal(VIRTIO_BLK_S_IOERR));
    }
    let offset_of = |sectors_of: &Segments| {
        let len = sectors_of.len();
        place(image, u64_at(&header, 8), len).filter(|_| len.is_multiple_of(SECTOR_BYTES))
    };
    let (action, data) = match kind {
        VIRTIO_BLK_T_IN => (offset_of(&writable).map(|offset| Action::Read { offset }), writable),
        VIRTIO_BLK_T_OUT => (offset_of(&readable).map(|offset| Action::Write { offset }), readable),
        VIRTIO_BLK_T_FLUSH => (Some(Action::Flush), Segments::default()),
        VIRTIO_BLK_T_GET_ID => (Some(Action::GetId), writable),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let mut range = [0; RANGE_BYTES];
            if !readable.take(memory, &mut range) || !readable.is_empty() {
                return Err(refusal(VIRTIO_BLK_S_IOERR));
            }
            let flags = u32_at(&range, 12);
            let known = if kind == VIRTIO_BLK_T_DISCARD { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
            if flags & !known != 0 {
                return Err(refusal(VIRTIO_BLK_S_UNSUPP));
            }
            (range_action(image, kind, &range, flags), Segments::default())
        }
        _ => return Err(refusal(VIRTIO_BLK_S_UNSUPP)),
    };
    match action {
        Some(action) => Ok(Request { action, data, status }),
        None => Err(refusal(VIRTIO_BLK_S_IOERR)),
    }
}

fn range_action(image: &Image, kind: u32, range: &[u8; RANGE_BYTES], flags: u32) -> Option<Action> {
    let sectors = u32_at(range, 8);
    let len = u64::from(sectors) * SECTOR_BYTES;
    let offset = place(image, u64_at(range, 0), len).filter(|_| sectors <= MAX_RANGE_SECTORS)?;
    Some(if kind == VIRTIO_BLK_T_DISCARD {
        Action::Discard { offset, len }
    } else {
        Action::WriteZeroes { offset, len, may_deallocate: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 }
    })
}

/// The offset of `len` bytes from `sector` on, where they are some and on the disk.
fn place(image: &Image, sector: u64, len: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR_BYTES)?;
    let end = offset.checked_add(len)?;
    (len > 0 && end <= image.len).then_some(offset)
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
