//! From the driver to the tap.

use std::{io, os::fd::AsFd};

use super::{Counters, FRAMES_PER_PASS, HEADER_SIZE, MAX_FRAME, frame::FrameMemory, tap::Tap};
use crate::virtio::{buffers::Buffers, virtqueue::Virtqueue};

/// The transmit queue of one pair.
pub struct Transmitter {
    queue: Virtqueue,
    frame: FrameMemory,
}

impl Transmitter {
    /// Nothing has been sent yet.
    pub fn new(queue: Virtqueue) -> Self {
        let frame = FrameMemory::new(queue.memory().clone());
        Self { queue, frame }
    }

    /// Sends frames as long as there are any, and then lets others get their turn.
    pub fn pass(&mut self, tap: &Tap, counters: &mut Counters) {
        self.queue.serve(FRAMES_PER_PASS, |memory, _, chain| {
            let buffers = Buffers::of(memory, chain).filter(|buffers| buffers.writable.is_empty());
            match buffers.and_then(|buffers| send(&mut self.frame, &buffers, tap)) {
                Some(length) => {
                    counters.sent_frames += 1;
                    counters.sent_bytes += (length - HEADER_SIZE) as u64;
                }
                None => counters.send_drops += 1,
            }
            Some(0)
        });
        self.queue.finish();
    }
}

/// Sends one frame, and answers its length; none when it is no frame, or the interface is down, gone, or full, which it is only
/// when someone has limited its buffer.
fn send(frame: &mut FrameMemory, buffers: &Buffers, tap: &Tap) -> Option<usize> {
    let length = usize::try_from(buffers.readable.len()).ok()?;
    if !(HEADER_SIZE..=MAX_FRAME).contains(&length) {
        return None;
    }
    frame.clear();
    frame.push(&buffers.readable)?;
    loop {
        match frame.send(tap.as_fd()) {
            Ok(()) => return Some(length),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}
