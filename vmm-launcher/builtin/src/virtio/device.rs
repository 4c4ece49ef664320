//! What a virtio device is to the transport that presents it.

use std::{fmt, os::fd::RawFd};

use virtio_queue::Queue;
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::Interrupt;
use crate::memory::GuestMemory;

/// One virtio device.
///
/// ```text
///            driver sets DRIVER_OK              driver writes 0 to the status
///  inactive ───────── activate ────────► active ───────── reset ────────► inactive
///                                         │ ▲ queue_notified, event
///                                         └─┘
/// ```
///
/// The transport calls everything with the device's lock held. `activate` and `reset` come from a vCPU's thread,
/// `queue_notified` and `event` from the device thread, and only while the device is active. None may block.
///
/// Everything that the guest wrote (queues, buffers, configuration) is untrusted: a broken request is answered as the
/// specification says where it says so; after a queue that cannot be parsed a device ignores its queues until it is reset.
/// It never panics and never ends the VM.
pub trait VirtioDevice: Send {
    /// The device's type number, virtio 1.2 §5.
    fn kind(&self) -> u32;

    /// Waits until whoever serves the device has answered, where that is another process.
    fn meet_backend(&self) -> Result<(), ActivateError> {
        Ok(())
    }

    /// The feature bits of this kind of device and of its rings. `VIRTIO_F_VERSION_1` is the transport's.
    fn features(&self) -> u64;

    /// The largest size of each virtqueue, each a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from `offset` on in the configuration space; what lies beyond its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes to the configuration space; ignored where it is read-only.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: starts work. An error is logged and sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError>;

    /// Descriptors beside the queues' that the device thread has to watch while the device is active; asked once after
    /// each `activate`. They must stay open until `reset`.
    fn watches(&self) -> Vec<Watch> {
        Vec::new()
    }

    /// The driver has made buffers available in queue `queue`. The transport has read the queue's eventfd.
    fn queue_notified(&mut self, queue: usize);

    /// Something happened on a descriptor of [`Self::watches`].
    fn event(&mut self, _event: Event) {}

    /// Whether another process serves the queues and signals the interrupt itself (vhost-user): the transport then leaves
    /// the queues' eventfds alone, and reads its interrupt status as "used buffer" always.
    fn is_served_elsewhere(&self) -> bool {
        false
    }

    /// Forgets the driver. When this returns the device does not touch guest memory any more.
    fn reset(&mut self);

    /// What the device has counted since it was made, as pairs of a name in Prometheus' manner ("read_bytes_total") and
    /// its value.
    fn metrics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Why a device cannot start to work; told in the log only, because the guest could not understand it.
pub type ActivateError = Box<dyn std::error::Error + Send + Sync>;

/// What a driver has negotiated and set up. The transport has checked that every queue is valid in guest memory.
pub struct Driver {
    /// The accepted feature bits, a subset of those offered.
    pub features: u64,
    /// Where the queues and their buffers are.
    pub memory: GuestMemory,
    /// All of the device's queues in order; one that the driver did not set up is not `ready()`.
    pub queues: Vec<Queue>,
    /// Readable when the driver has made buffers available, one for each queue.
    pub kicks: Vec<EventFd>,
    /// How to tell the driver.
    pub interrupt: Interrupt,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("features", &self.features).finish_non_exhaustive()
    }
}

/// A descriptor for the device thread to watch.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    /// Not a queue's.
    pub descriptor: RawFd,
    /// `EventSet::IN`, with `EDGE_TRIGGERED` where wanted.
    pub events: EventSet,
    /// The device's own number for it, handed back in [`Event::token`].
    pub token: u32,
}

/// Something happened on a watched descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// See [`Watch::token`].
    pub token: u32,
    /// What happened.
    pub events: EventSet,
}
