//! A device's way to interrupt its driver.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

/// Interrupts the driver of one device. A clone is another handle to the same interrupt.
#[derive(Clone, Debug)]
pub struct Interrupt {
    /// `InterruptStatus`, virtio 1.2 §4.2.2: why the interrupt was raised, until the driver acknowledges it.
    status: Arc<AtomicU32>,
    /// KVM raises the interrupt when this is written.
    line: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt that is raised by writing `line`.
    pub fn new(line: EventFd) -> Self {
        Self { status: Arc::default(), line: Arc::new(line) }
    }

    /// Tells that buffers were used. Whether the driver wants to know is the caller's to ask
    /// (`virtio_queue::QueueT::needs_notification`).
    pub fn used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells that the configuration space has changed.
    pub fn config_changed(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// What a process that serves the queues writes to interrupt the driver.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Why the interrupt is raised: the transport's register.
    pub(super) fn status(&self) -> &AtomicU32 {
        &self.status
    }

    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        // It can only fail when the counter is full, and then the interrupt is being raised already.
        let _ = self.line.write(1);
    }
}
