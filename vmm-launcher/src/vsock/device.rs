//! The device between two virtqueues and the muxer: chains in, packets out, and the other way
//! round. It does no I/O of its own and knows nothing about how queues are set up or kicked.

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemory, Permissions};

use super::Error;
use super::muxer::Muxer;
use super::packet::{Buffer, HEADER_SIZE};

/// Chains of one queue that are handled before its owner gets a look at anything else.
const CHAINS_PER_PASS: usize = 256;

/// What the owner of the queues has to do after [`VsockDevice::process`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Interrupt the guest for the receive queue.
    pub interrupt_rx: bool,
    /// Interrupt the guest for the transmit queue.
    pub interrupt_tx: bool,
    /// Call again without waiting for a kick: there is more.
    pub more: bool,
}

/// A virtio-vsock device (virtio 1.2 §5.10) without its transport.
///
/// The owner waits until [`as_raw_fd`](AsRawFd::as_raw_fd) is readable or a queue is kicked; it calls
/// [`handle_host_events`](Self::handle_host_events) in the first case and, in both,
/// [`process`](Self::process).
pub struct VsockDevice {
    muxer: Muxer,
    /// Where we stopped in the two available rings.
    positions: [u16; 2],
}

impl VsockDevice {
    /// A device for the guest `guest_cid`, with host programs served on the Unix socket `uds`,
    /// which exists from here on until the device is dropped.
    ///
    /// # Errors
    /// When `uds` is too long or cannot be bound, or `guest_cid` is reserved.
    pub fn new(uds: &Path, guest_cid: u64) -> Result<Self, Error> {
        Ok(Self { muxer: Muxer::new(uds, guest_cid)?, positions: [0; 2] })
    }

    /// The device's configuration space: the guest's CID (virtio 1.2 §5.10.4).
    pub fn config(&self) -> [u8; 8] {
        self.muxer.guest_cid().to_le_bytes()
    }

    /// Takes note of what has happened on the host's sockets; never blocks.
    pub fn handle_host_events(&mut self) {
        self.muxer.handle_host_events();
    }

    /// Moves packets both ways, as far as both sides have room, for a bounded time.
    ///
    /// Connections end when a queue's position is not where this method left it, because then a
    /// driver has started afresh.
    ///
    /// # Errors
    /// When the driver has broken a queue's rings. Nothing more can be done with them until the
    /// driver sets them up again.
    pub fn process<M>(&mut self, memory: &M, rx: &mut Queue, tx: &mut Queue) -> Result<Progress, virtio_queue::Error>
    where
        M: GuestMemory,
    {
        if self.positions != [rx.next_avail(), tx.next_avail()] {
            self.muxer.abandon_connections();
        }
        let result = self.move_packets(memory, rx, tx);
        self.positions = [rx.next_avail(), tx.next_avail()];
        result
    }

    fn move_packets<M>(&mut self, memory: &M, rx: &mut Queue, tx: &mut Queue) -> Result<Progress, virtio_queue::Error>
    where
        M: GuestMemory,
    {
        let sent = self.transmit(memory, tx)?;
        let received = self.receive(memory, rx)?;
        Ok(Progress {
            interrupt_rx: received.used && rx.needs_notification(memory)?,
            interrupt_tx: sent.used && tx.needs_notification(memory)?,
            more: received.more || (sent.more && !self.muxer.is_congested()),
        })
    }

    /// Guest → host.
    fn transmit<M>(&mut self, memory: &M, queue: &mut Queue) -> Result<Pass, virtio_queue::Error>
    where
        M: GuestMemory,
    {
        let mut used = false;
        queue.disable_notification(memory)?;
        for _ in 0..CHAINS_PER_PASS {
            if self.muxer.is_congested() {
                return Ok(Pass { used, more: true });
            }
            let Some(chain) = queue.iter(memory)?.next() else {
                return Ok(Pass { used, more: queue.enable_notification(memory)? });
            };
            let head = chain.head_index();
            if let Some(mut packet) = Buffer::from_chain(memory, chain, Permissions::Read)
                && let Some(header) = packet.take_header()
            {
                let length = packet.len().min(header.len as usize);
                if let Some(payload) = packet.take_front(length) {
                    self.muxer.receive(&header, &payload);
                }
            }
            queue.add_used(memory, head, 0)?;
            used = true;
        }
        Ok(Pass { used, more: true })
    }

    /// Host → guest.
    fn receive<M>(&mut self, memory: &M, queue: &mut Queue) -> Result<Pass, virtio_queue::Error>
    where
        M: GuestMemory,
    {
        let mut used = false;
        queue.disable_notification(memory)?;
        for _ in 0..CHAINS_PER_PASS {
            if !self.muxer.wants_guest() {
                return Ok(Pass { used, more: false });
            }
            let Some(chain) = queue.iter(memory)?.next() else {
                return Ok(Pass { used, more: queue.enable_notification(memory)? });
            };
            let head = chain.head_index();
            let buffer = Buffer::from_chain(memory, chain, Permissions::Write);
            let mut length = 0;
            if let Some(mut payload) = buffer
                && let Some(space) = payload.take_front(HEADER_SIZE)
                && payload.len() > 0
            {
                let Some(header) = self.muxer.fill(&payload) else {
                    queue.go_to_previous_position();
                    return Ok(Pass { used, more: false });
                };
                space.put_header(header);
                length = HEADER_SIZE as u32 + header.len;
            }
            queue.add_used(memory, head, length)?;
            used = true;
        }
        Ok(Pass { used, more: true })
    }
}

impl AsRawFd for VsockDevice {
    /// Readable when a host socket needs attention.
    fn as_raw_fd(&self) -> RawFd {
        self.muxer.as_raw_fd()
    }
}

/// What became of one queue.
struct Pass {
    used: bool,
    more: bool,
}
