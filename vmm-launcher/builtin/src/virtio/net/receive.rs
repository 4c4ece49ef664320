//! From the tap to the driver.

use std::{collections::VecDeque, io, os::fd::AsFd};

use super::{Counters, FRAMES_PER_PASS, HEADER_SIZE, MAX_FRAME, frame::FrameMemory, tap::Tap};
use crate::virtio::{buffers::Buffers, virtqueue::Virtqueue};

/// Where `num_buffers` is in a `virtio_net_hdr_v1`.
const NUM_BUFFERS: usize = 10;

/// The receive queue of one pair.
pub struct Receiver {
    queue: Virtqueue,
    /// A frame may fill several chains (`VIRTIO_NET_F_MRG_RXBUF`); otherwise each gets one.
    mergeable: bool,
    /// Taken from the driver, and not used yet.
    chains: VecDeque<Room>,
    /// The memory of `chains`.
    room: FrameMemory,
    room_bytes: usize,
}

/// One chain.
struct Room {
    head: u16,
    bytes: usize,
    /// Of the memory.
    pieces: usize,
}

impl Receiver {
    /// Nothing has been received yet.
    pub fn new(queue: Virtqueue, mergeable: bool) -> Self {
        let room = FrameMemory::new(queue.memory().clone());
        Self { queue, mergeable, chains: VecDeque::new(), room, room_bytes: 0 }
    }

    /// Receives frames as long as there are any and the driver has room, and then lets others get their turn.
    pub fn pass(&mut self, tap: &Tap, counters: &mut Counters) {
        if (0..FRAMES_PER_PASS).all(|_| self.receive(tap, counters)) {
            self.queue.serve_again();
        }
        self.queue.finish();
    }

    /// Whether there may be more.
    fn receive(&mut self, tap: &Tap, counters: &mut Counters) -> bool {
        if !self.take_chains() {
            return false;
        }
        match self.room.receive(tap.as_fd()) {
            Ok(Some(length)) => {
                self.deliver(length);
                counters.received_frames += 1;
                counters.received_bytes += length.saturating_sub(HEADER_SIZE) as u64;
                true
            }
            Ok(None) => {
                counters.receive_drops += 1;
                true
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            // The interface is gone.
            Err(_) => {
                counters.receive_errors += 1;
                false
            }
        }
    }

    /// Takes chains from the driver until there is room for a frame; if there is none, the driver's next chain notifies us.
    fn take_chains(&mut self) -> bool {
        for _ in 0..self.queue.size() {
            if self.has_room() {
                break;
            }
            let taken = self.queue.take(|memory, head, chain| {
                let buffers = Buffers::of(memory, chain).filter(|buffers| buffers.readable.is_empty());
                let room = buffers.and_then(|buffers| {
                    let pieces = self.room.push(&buffers.writable)?;
                    Some(Room { head, bytes: buffers.writable.len() as usize, pieces })
                });
                room.ok_or(head)
            });
            match taken {
                Some(Ok(room)) => {
                    self.room_bytes += room.bytes;
                    self.chains.push_back(room);
                }
                Some(Err(head)) => self.queue.complete(head, 0),
                None => return false,
            }
        }
        self.has_room()
    }

    /// Whether the longest frame fits, or the driver can give no more room than this.
    fn has_room(&self) -> bool {
        match self.mergeable {
            true => self.room_bytes >= MAX_FRAME || self.room.pieces() >= usize::from(self.queue.size()),
            false => !self.chains.is_empty(),
        }
    }

    /// Gives the driver the chains that hold a frame of `length` bytes. It would drop a frame of which a part seems to be
    /// missing, so that it must see all of them at once.
    fn deliver(&mut self, length: usize) {
        let mut rest = length;
        let mut used = Vec::with_capacity(1);
        let mut pieces = 0;
        while let Some(room) = self.chains.pop_front() {
            let part = rest.min(room.bytes);
            rest -= part;
            pieces += room.pieces;
            self.room_bytes -= room.bytes;
            used.push((room.head, part as u32));
            if rest == 0 {
                break;
            }
        }
        self.room.write(NUM_BUFFERS, &(used.len() as u16).to_le_bytes());
        self.room.remove_front(pieces);
        self.queue.complete_together(&used);
    }
}
