//! The vhost-user service around a [`VsockDevice`]: a hypervisor connects, hands over guest
//! memory and virtqueues, and the device works on them in this process. No vsock rule lives here.
//!
//! Threads: `vsock-service` waits for the hypervisor and then for its end; the vhost-user
//! library's request thread sleeps between the hypervisor's messages; its `vring_worker` does all
//! the work, on one epoll loop for kicks and host sockets.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sys::socket::{self, Shutdown};
use tracing::{debug, warn};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringMutex, VringState, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::{Error, VsockDevice};

/// Receive, transmit and event queue (virtio 1.2 §5.10.2). The device has no event to send.
const QUEUES: usize = 3;
/// The largest queue that a hypervisor may set up; QEMU asks for 128.
const MAX_QUEUE_SIZE: usize = 1024;
/// The epoll number of the host sockets; the library keeps those up to `QUEUES` to itself.
const HOST_EVENT: u16 = QUEUES as u16 + 1;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Memory>;

/// Serves one guest's vsock to a hypervisor over vhost-user, until dropped or until the
/// hypervisor disconnects; both close every connection and remove the hybrid vsock socket.
pub struct VsockBackend {
    control: Arc<Control>,
    /// The hypervisor's socket once more, to end the wait for it.
    listener: UnixListener,
    thread: Option<JoinHandle<()>>,
}

impl VsockBackend {
    /// Starts serving. `vhost_user` is a listening socket to which the hypervisor will connect
    /// once; `uds` is where host programs connect, bound when this returns, so that nobody has to
    /// wait for it; `guest_cid` is what the guest is told that its CID is.
    ///
    /// # Errors
    /// When `uds` is too long or taken, `guest_cid` is reserved, or the kernel is out of threads
    /// or descriptors.
    pub fn start(vhost_user: UnixListener, uds: &Path, guest_cid: u64) -> Result<Self, Error> {
        let setup = |what| move |source| Error::Setup { what, source };
        // The library would spin on a non-blocking socket.
        vhost_user.set_nonblocking(false).map_err(setup("the hypervisor's socket"))?;
        let listener = vhost_user.try_clone().map_err(setup("the hypervisor's socket"))?;

        let control = Arc::new(Control::default());
        let memory = Memory::new(GuestMemoryMmap::new());
        let service = Service::new(uds, guest_cid, memory.clone(), control.clone())?;
        let host_events = lock(&service.device).as_raw_fd();
        let daemon = VhostUserDaemon::new("vsock-requests".to_owned(), Arc::new(service), memory)
            .map_err(|error| Error::VhostUser(error.to_string()))?;
        for worker in daemon.get_epoll_handlers() {
            worker
                .register_listener(host_events, EventSet::IN, HOST_EVENT.into())
                .map_err(setup("the host sockets' events"))?;
        }
        let thread = thread::Builder::new()
            .name("vsock-service".to_owned())
            .spawn({
                let control = control.clone();
                move || serve(daemon, vhost_user.into(), &control)
            })
            .map_err(setup("a thread"))?;
        Ok(Self { control, listener, thread: Some(thread) })
    }

    /// Answers when the hypervisor has disconnected.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for VsockBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockBackend").finish_non_exhaustive()
    }
}

impl Drop for VsockBackend {
    fn drop(&mut self) {
        self.control.stopping.store(true, Ordering::Release);
        // Wakes the wait for the hypervisor; fails when that is over, which is as good.
        let _ = socket::shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(connection) = &*lock(&self.control.connection) {
            connection.shutdown();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How the service is told to stop.
#[derive(Default)]
struct Control {
    /// Nothing that the guest offers is of interest any more.
    stopping: AtomicBool,
    /// Ends the hypervisor's connection, while there is one.
    connection: Mutex<Option<ShutdownHandle>>,
}

impl Control {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// Waits for the hypervisor, then for its end, and takes everything down.
fn serve(mut daemon: VhostUserDaemon<Arc<Service>>, mut listener: Listener, control: &Control) {
    if let Err(error) = daemon.start(&mut listener) {
        if !control.is_stopping() {
            warn!(%error, "no hypervisor can connect to the vsock device");
        }
        return;
    }
    drop(listener);
    *lock(&control.connection) = daemon.shutdown_handle();
    if control.is_stopping() {
        daemon.request_shutdown();
    }
    match daemon.wait() {
        Ok(()) => debug!("the hypervisor left the vsock device"),
        Err(error) => debug!(%error, "the hypervisor left the vsock device"),
    }
    lock(&control.connection).take();
    // Dropping the daemon joins the worker, which must not go on for a guest that does. The
    // device, its sockets and the guest's memory go with it.
    control.stopping.store(true, Ordering::Release);
}

/// What the vhost-user library calls, from the request thread and from the worker.
struct Service {
    config: [u8; 8],
    device: Mutex<VsockDevice>,
    /// Shared with the library, which replaces its contents.
    memory: Memory,
    control: Arc<Control>,
}

impl Service {
    fn new(uds: &Path, guest_cid: u64, memory: Memory, control: Arc<Control>) -> Result<Self, Error> {
        let device = VsockDevice::new(uds, guest_cid)?;
        Ok(Self { config: device.config(), device: Mutex::new(device), memory, control })
    }

    /// One pass over the queues; whether there is more to do at once.
    fn pass(&self, rx: &Vring, tx: &Vring) -> bool {
        let memory = self.memory.memory();
        let mut device = lock(&self.device);
        let (mut rx, mut tx) = (rx.get_mut(), tx.get_mut());
        if !is_running(&rx) || !is_running(&tx) {
            return false;
        }
        let progress = device.process(&*memory, rx.get_queue_mut(), tx.get_queue_mut());
        let progress = match progress {
            Ok(progress) => progress,
            Err(error) => {
                debug!(%error, "the guest's vsock queues are broken");
                return false;
            }
        };
        let signals = [(progress.interrupt_rx, &rx), (progress.interrupt_tx, &tx)];
        for (_, vring) in signals.into_iter().filter(|(needed, _)| *needed) {
            // Fails only when the hypervisor has left.
            let _ = vring.signal_used_queue();
        }
        progress.more
    }
}

impl VhostUserBackend for Service {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// The library has told the queues.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let bytes = self.config.iter().skip(offset as usize).take(size as usize);
        bytes.copied().collect()
    }

    /// The library has changed the contents of `self.memory` itself.
    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// Waits for the pass that is under way; the next one sees that the queue has stopped.
    fn stop_vring(&self, _index: u32) -> io::Result<()> {
        drop(lock(&self.device));
        Ok(())
    }

    /// Never fails, because the library would end the worker.
    fn handle_event(&self, _event: u16, _set: EventSet, vrings: &[Vring], _thread: usize) -> io::Result<()> {
        let [rx, tx, ..] = vrings else { return Ok(()) };
        // Whatever the event was: a busy guest must not keep the host's programs waiting.
        loop {
            lock(&self.device).handle_host_events();
            if !self.pass(rx, tx) || self.control.is_stopping() {
                return Ok(());
            }
        }
    }
}

fn is_running(vring: &VringState<Memory>) -> bool {
    vring.is_enabled() && vring.get_queue().ready()
}

/// The data behind our locks is valid at every step, so that a panic elsewhere is no reason to stop.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
