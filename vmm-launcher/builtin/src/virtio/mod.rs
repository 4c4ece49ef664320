//! virtio devices (virtio 1.2), one file each, behind one transport.
//!
//! ```text
//!  vCPU threads ──registers──► transport (virtio over MMIO) ──activate, reset──► VirtioDevice
//!  device thread: one epoll loop ──queue_notified(queue), event(token)─────────► VirtioDevice
//! ```

pub mod device;
pub mod interrupt;
pub mod transport;

pub mod balloon;
pub mod block;
pub mod fs;
pub mod net;
pub mod pmem;
pub mod rng;
pub mod vhost_user;
pub mod vsock;

mod buffers;
mod config_space;
pub mod disk_io;
#[cfg(test)]
mod fake_driver;
mod image;
mod virtqueue;

pub use balloon::{Balloon, BalloonControl};
pub use block::Block;
pub use device::{Driver, Event, VirtioDevice, Watch};
pub use disk_io::IoEngine;
pub use interrupt::Interrupt;
pub use net::Net;
pub use pmem::{Pmem, PmemImage};
pub use rng::Rng;
pub use transport::Transport;
pub use vsock::Vsock;
