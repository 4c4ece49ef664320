//! The device, from both of its sides at once: real Unix sockets on the host's, a fake driver on
//! the guest's. Nothing here waits or depends on time.

mod fake_guest;

mod connecting;
mod streaming;

mod closing;
mod hostile;

mod service;
mod virtqueues;
