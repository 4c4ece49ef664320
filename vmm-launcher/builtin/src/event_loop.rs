//! The device thread: waits for descriptors to become ready, and calls the devices that they belong to.
//!
//! The kernel's epoll set is shared: a device that a vCPU's thread activates adds its descriptors from there, and nobody
//! has to be woken for it.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    thread::JoinHandle,
};

use caisson_vmm_launcher::{Error, Result};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

/// As many events as one wait brings.
const BATCH: usize = 32;
/// The number of no handler: tells the thread to end.
const END: u64 = u64::MAX;
/// For every thread of the VM: devices keep their buffers on the heap.
pub const STACK_BYTES: usize = 256 << 10;

/// Owns descriptors that the loop watches.
pub trait Handler: Send + Sync {
    /// Something happened on the descriptor that was added with `token`; perhaps one that was removed meanwhile.
    fn ready(&self, token: u32, events: EventSet);
}

/// Adds and removes the descriptors of one handler, from any thread.
#[derive(Clone)]
pub struct Watcher {
    epoll: Arc<Epoll>,
    handler: u32,
}

impl Watcher {
    /// Watches `descriptor`, which stays open until it is removed or closed for good.
    pub fn add(&self, descriptor: RawFd, events: EventSet, token: u32) -> io::Result<()> {
        let data = u64::from(self.handler) << 32 | u64::from(token);
        self.epoll.ctl(ControlOperation::Add, descriptor, EpollEvent::new(events, data))
    }

    /// Watches `descriptor` no more.
    pub fn remove(&self, descriptor: RawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, descriptor, EpollEvent::default())
    }
}

/// A loop that does not run yet.
pub struct EventLoop {
    epoll: Arc<Epoll>,
    handlers: Vec<Arc<dyn Handler>>,
}

impl EventLoop {
    /// A loop without handlers.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> Result<Self> {
        let epoll = Epoll::new().map_err(Error::host("make the device thread's epoll set"))?;
        Ok(Self { epoll: Arc::new(epoll), handlers: Vec::new() })
    }

    /// What the handler that is pushed next adds its descriptors with.
    pub fn watcher(&self) -> Watcher {
        Watcher { epoll: self.epoll.clone(), handler: self.handlers.len() as u32 }
    }

    /// Adds a handler; it was made with [`Self::watcher`].
    pub fn push(&mut self, handler: Arc<dyn Handler>) {
        self.handlers.push(handler);
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// When the host refuses one.
    pub fn start(self) -> Result<DeviceThread> {
        let start = || {
            let end = EventFd::new(EFD_NONBLOCK)?;
            self.epoll.ctl(ControlOperation::Add, end.as_raw_fd(), EpollEvent::new(EventSet::IN, END))?;
            let thread = std::thread::Builder::new().name("devices".into()).stack_size(STACK_BYTES);
            let thread = thread.spawn(move || run(&self.epoll, &self.handlers))?;
            Ok(DeviceThread { end, thread: Some(thread) })
        };
        start().map_err(Error::host("start the device thread"))
    }
}

/// The running loop; ends, and is waited for, when dropped.
pub struct DeviceThread {
    end: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        let _ = self.end.write(1);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn run(epoll: &Epoll, handlers: &[Arc<dyn Handler>]) {
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        // It fails only by a signal: the set and the array are valid.
        let count = epoll.wait(-1, &mut events).unwrap_or_default();
        for event in &events[..count] {
            match event.data() {
                END => return,
                data => handlers[(data >> 32) as usize].ready(data as u32, event.event_set()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Tell(Sender<u32>);

    impl Handler for Tell {
        fn ready(&self, token: u32, _: EventSet) {
            let _ = self.0.send(token);
        }
    }

    #[test]
    fn a_handler_is_called_with_its_token_also_for_what_is_added_late() {
        let mut event_loop = EventLoop::new().unwrap();
        let (tell, told) = channel();
        event_loop.push(Arc::new(Tell(channel().0)));
        let watcher = event_loop.watcher();
        event_loop.push(Arc::new(Tell(tell)));
        let _thread = event_loop.start().unwrap();
        let descriptor = EventFd::new(EFD_NONBLOCK).unwrap();
        watcher.add(descriptor.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, 7).unwrap();
        descriptor.write(1).unwrap();
        assert_eq!(told.recv().unwrap(), 7);
    }
}
