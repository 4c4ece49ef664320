//! One virtqueue with all that it takes to serve it: rings, guest memory, the driver's kick and its interrupt.
//!
//! The recipe of a pass, for every device: [`Virtqueue::serve`] what is available, [`Virtqueue::complete`] what was left for
//! later, and [`Virtqueue::finish`] once.

use std::{
    mem,
    sync::atomic::{Ordering, fence},
};

use tracing::debug;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryResult};
use vmm_sys_util::eventfd::EventFd;

use super::{Driver, Interrupt};
use crate::memory::GuestMemory;

/// One request's descriptors, not yet looked at.
pub type Chain<'a> = DescriptorChain<&'a GuestMemory>;

/// A virtqueue that a driver has set up.
#[derive(Debug)]
pub struct Virtqueue {
    queue: Queue,
    memory: GuestMemory,
    kick: EventFd,
    interrupt: Interrupt,
    /// The rings make no sense: nothing is served until the device is reset.
    is_broken: bool,
    /// A pass ended before the work did.
    is_cut_short: bool,
    /// Up to where in the used ring the driver was told.
    told: u16,
}

impl Virtqueue {
    /// All of a driver's queues, in order; `None` where it did not set up one.
    pub fn all(driver: Driver) -> Vec<Option<Self>> {
        let Driver { features, memory, queues, kicks, interrupt } = driver;
        let with_event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let virtqueue = |(mut queue, kick): (Queue, EventFd)| {
            queue.set_event_idx(with_event_idx);
            queue.ready().then(|| Self {
                queue,
                memory: memory.clone(),
                kick,
                interrupt: interrupt.clone(),
                is_broken: false,
                is_cut_short: false,
                told: 0,
            })
        };
        queues.into_iter().zip(kicks).map(virtqueue).collect()
    }

    /// Hands each available request to `serve`, with the number that [`Self::complete`] knows it by. `serve` answers how many
    /// bytes it has written to the guest, or `None` when it will complete the request later.
    ///
    /// At most `room` requests and at most as many as the queue has entries, so that no device keeps the others waiting;
    /// [`Self::finish`] sees to the rest. With no room, the caller serves again when it has some.
    pub fn serve(&mut self, room: usize, serve: impl FnMut(&GuestMemory, u16, Chain<'_>) -> Option<u32>) {
        if room == 0 || self.is_broken {
            return;
        }
        let result = self.try_serve(room, serve);
        self.check(result);
    }

    /// Hands the next available request to `take`, with its number; it is to be completed later. When there is none, the
    /// driver's next one notifies us.
    pub fn take<T>(&mut self, take: impl FnOnce(&GuestMemory, u16, Chain<'_>) -> T) -> Option<T> {
        if self.is_broken {
            return None;
        }
        match self.try_take(take) {
            Ok(taken) => taken,
            Err(error) => {
                self.check(Err(error));
                None
            }
        }
    }

    /// Gives a request's buffers back to the driver, `written` bytes of them written.
    pub fn complete(&mut self, head: u16, written: u32) {
        if self.is_broken {
            return;
        }
        let result = self.queue.add_used(&self.memory, head, written);
        self.check(result);
    }

    /// As [`Self::complete`] for several requests, of which the driver sees all or none, whenever it looks.
    pub fn complete_together(&mut self, requests: &[(u16, u32)]) {
        if self.is_broken {
            return;
        }
        let result = self.put_used(requests).map_err(Error::GuestMemory);
        self.check(result);
    }

    /// Ends a pass: interrupts the driver if there is news that it wants, and asks for another pass where this was cut short.
    pub fn finish(&mut self) {
        let told = mem::replace(&mut self.told, self.queue.next_used());
        if told != self.told && self.wants_interrupt(told).unwrap_or(true) {
            self.interrupt.used_buffers();
        }
        if mem::take(&mut self.is_cut_short) {
            // It can only fail when the counter is full, and then the next pass is already due.
            let _ = self.kick.write(1);
        }
    }

    /// How many requests it can hold.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where its buffers are.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Has [`Self::finish`] ask for another pass.
    pub fn serve_again(&mut self) {
        self.is_cut_short = true;
    }

    fn try_serve(
        &mut self,
        room: usize,
        mut serve: impl FnMut(&GuestMemory, u16, Chain<'_>) -> Option<u32>,
    ) -> Result<(), Error> {
        let mut room = room.min(self.queue.size().into());
        self.queue.disable_notification(&self.memory)?;
        loop {
            while let Some(chain) = self.queue.iter(&self.memory)?.next() {
                let head = chain.head_index();
                if let Some(written) = serve(&self.memory, head, chain) {
                    self.queue.add_used(&self.memory, head, written)?;
                }
                room -= 1;
                if room == 0 {
                    self.is_cut_short = true;
                    return Ok(());
                }
            }
            // Once more where the driver made a buffer available before it knew that we want to be notified.
            if !self.queue.enable_notification(&self.memory)? {
                return Ok(());
            }
        }
    }

    fn try_take<T>(&mut self, take: impl FnOnce(&GuestMemory, u16, Chain<'_>) -> T) -> Result<Option<T>, Error> {
        loop {
            if let Some(chain) = self.queue.iter(&self.memory)?.next() {
                return Ok(Some(take(&self.memory, chain.head_index(), chain)));
            }
            if !self.queue.enable_notification(&self.memory)? {
                return Ok(None);
            }
        }
    }

    /// The library publishes each element of the ring by itself.
    fn put_used(&mut self, requests: &[(u16, u32)]) -> GuestMemoryResult<()> {
        let ring = self.queue.used_ring();
        let mut next = self.queue.next_used();
        for (head, written) in requests {
            let element = [u32::from(*head).to_le(), written.to_le()];
            let offset = 4 + 8 * u64::from(next % self.queue.size());
            self.memory.write_obj(element, GuestAddress(ring + offset))?;
            next = next.wrapping_add(1);
        }
        self.memory.store(next.to_le(), GuestAddress(ring + 2), Ordering::Release)?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Whether the driver wants to know of what was used since `told`, virtio 1.2 §2.7.7. (The library counts only what it has
    /// put into the ring itself.)
    fn wants_interrupt(&self, told: u16) -> GuestMemoryResult<bool> {
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        let load = |offset| self.memory.load::<u16>(GuestAddress(ring + offset), Ordering::Relaxed).map(u16::from_le);
        if !self.queue.event_idx_enabled() {
            return Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = load(4 + 2 * u64::from(self.queue.size()))?;
        let used = self.queue.next_used();
        Ok(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(told))
    }

    fn check(&mut self, result: Result<(), Error>) {
        if let Err(error) = result {
            // At a level that a guest cannot fill a log with.
            debug!(%error, "a virtqueue is broken and ignored until the device is reset");
            self.is_broken = true;
        }
    }
}
