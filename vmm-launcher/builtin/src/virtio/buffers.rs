//! The buffers of one request: guest memory that the driver names, checked once, here.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::virtqueue::Chain;
use crate::memory::GuestMemory;

/// The most buffers that a request may have. It is below the kernel's `UIO_MAXIOV` (1024), so that a request is one call, and
/// leaves some for buffers that lie across two regions of memory.
const MAX_SEGMENTS: usize = 1000;

/// What a device reads and what it writes for one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// The driver's words to the device.
    pub readable: Segments,
    /// Where the device answers.
    pub writable: Segments,
}

impl Buffers {
    /// The buffers of `chain`; `None` where it has too many, names memory that is none, or mixes what the device reads and
    /// writes (virtio 1.2 §2.7.4.2).
    pub fn of(memory: &GuestMemory, chain: Chain<'_>) -> Option<Self> {
        let mut buffers = Self { readable: Segments::default(), writable: Segments::default() };
        for (count, descriptor) in chain.enumerate() {
            let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
            if count == MAX_SEGMENTS || !segment.is_in(memory) {
                return None;
            }
            if descriptor.is_write_only() {
                buffers.writable.push(segment);
            } else if buffers.writable.is_empty() {
                buffers.readable.push(segment);
            } else {
                return None;
            }
        }
        Some(buffers)
    }
}

/// One piece of guest memory, contiguous for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// In bytes.
    pub len: u32,
}

impl Segment {
    fn is_in(self, memory: &GuestMemory) -> bool {
        memory.check_range(self.address, self.len as usize)
    }
}

/// Pieces of guest memory in the order that data has in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments(Vec<Segment>);

impl Segments {
    /// All of their bytes.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Whether they hold no byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pieces; none is empty.
    pub fn as_slice(&self) -> &[Segment] {
        &self.0
    }

    /// Takes as many bytes from the front as `data` has, and reads them; `false` where there are too few.
    pub fn take(&mut self, memory: &GuestMemory, data: &mut [u8]) -> bool {
        if self.len() < data.len() as u64 {
            return false;
        }
        let mut data = data;
        while let (Some(segment), false) = (self.0.first(), data.is_empty()) {
            let len = data.len().min(segment.len as usize);
            let (now, later) = data.split_at_mut(len);
            if memory.read_slice(now, segment.address).is_err() {
                return false;
            }
            self.skip(len as u64);
            data = later;
        }
        true
    }

    /// Writes `data` at the front, as far as there is room; answers how many bytes that are.
    pub fn write(&self, memory: &GuestMemory, data: &[u8]) -> usize {
        let mut rest = data;
        for segment in &self.0 {
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            if memory.write_slice(now, segment.address).is_err() {
                break;
            }
            rest = later;
        }
        data.len() - rest.len()
    }

    /// Takes the last byte off.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.0.last_mut()?;
        last.len -= 1;
        let address = last.address.unchecked_add(last.len.into());
        if last.len == 0 {
            self.0.pop();
        }
        Some(address)
    }

    /// Drops `len` bytes from the front.
    pub fn skip(&mut self, mut len: u64) {
        let mut whole = 0;
        while let Some(segment) = self.0.get(whole).filter(|segment| u64::from(segment.len) <= len) {
            len -= u64::from(segment.len);
            whole += 1;
        }
        self.0.drain(..whole);
        if let Some(first) = self.0.first_mut() {
            // Below the segment's length, or it would have been dropped.
            first.len -= len as u32;
            first.address = first.address.unchecked_add(len);
        }
    }

    fn push(&mut self, segment: Segment) {
        if segment.len > 0 {
            self.0.push(segment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
    }

    fn segments(pieces: &[(u64, u32)]) -> Segments {
        let mut segments = Segments::default();
        pieces.iter().for_each(|&(address, len)| segments.push(Segment { address: GuestAddress(address), len }));
        segments
    }

    #[test]
    fn a_value_is_taken_across_pieces() {
        let memory = memory();
        memory.write_slice(b"ab", GuestAddress(0x10)).unwrap();
        memory.write_slice(b"cde", GuestAddress(0x20)).unwrap();
        let mut segments = segments(&[(0x10, 2), (0x20, 3)]);
        let mut data = [0; 4];
        assert!(segments.take(&memory, &mut data));
        assert_eq!(&data, b"abcd");
        assert_eq!(segments, self::segments(&[(0x22, 1)]));
    }

    #[test]
    fn too_few_bytes_are_not_taken() {
        let mut segments = segments(&[(0x10, 2)]);
        assert!(!segments.take(&memory(), &mut [0; 3]));
        assert_eq!(segments.len(), 2);
    }

    #[test]
    fn the_last_byte_leaves_no_empty_piece() {
        let mut segments = segments(&[(0x10, 2), (0x20, 1)]);
        assert_eq!(segments.take_last_byte(), Some(GuestAddress(0x20)));
        assert_eq!(segments.take_last_byte(), Some(GuestAddress(0x11)));
        assert_eq!(segments.take_last_byte(), Some(GuestAddress(0x10)));
        assert_eq!(segments.take_last_byte(), None);
    }

    #[test]
    fn writing_stops_where_the_room_ends() {
        let memory = memory();
        assert_eq!(segments(&[(0x10, 2), (0x20, 1)]).write(&memory, b"abcd"), 3);
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x10)).unwrap(), *b"ab");
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x20)).unwrap(), *b"c\0");
    }

    #[test]
    fn skipping_ends_inside_a_piece_or_after_all() {
        let mut segments = segments(&[(0x10, 4), (0x20, 4), (0x30, 4)]);
        segments.skip(6);
        assert_eq!(segments, self::segments(&[(0x22, 2), (0x30, 4)]));
        segments.skip(6);
        assert!(segments.is_empty());
    }
}
