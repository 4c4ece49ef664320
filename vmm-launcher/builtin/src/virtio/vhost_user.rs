//! A device of any kind whose queues another process serves: the frontend's side of vhost-user.
//!
//! ```text
//!  features, activate, reset, configuration ──► messages on a Unix socket ──► backend
//!  the guest's memory, kick and interrupt descriptors go with them; after that backend and driver are among themselves
//! ```
//!
//! What a backend can do is asked when the VM is built, and the rest when the driver asks.

use std::{
    cell::OnceCell,
    io,
    net::Shutdown,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use tracing::{debug, error};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::epoll::EventSet;

use super::{Driver, Event, VirtioDevice, Watch, config_space, device::ActivateError};

/// A backend answers at once, unless it is still starting or the host is very busy.
const DEADLINE: Duration = Duration::from_secs(10);

/// Queues that a backend may have, as the library needs to know it beforehand.
const MAX_QUEUES: u64 = 256;

/// What is used of the protocol.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::REPLY_ACK).union(VhostUserProtocolFeatures::CONFIG);

/// What a device is, other than its backend.
#[derive(Clone, Debug)]
pub struct Description {
    /// For people: "share \"data\"".
    pub name: String,
    /// See [`VirtioDevice::kind`].
    pub kind: u32,
    /// The features that are offered to the driver where the backend has them.
    pub features: u64,
    /// See [`VirtioDevice::queue_sizes`].
    pub queue_sizes: Vec<u16>,
    /// Where the configuration space is.
    pub config: Config,
}

/// A device's configuration space.
#[derive(Clone, Debug)]
pub enum Config {
    /// Known here.
    Fixed(Vec<u8>),
    /// The backend has it: so many bytes.
    Backend(u32),
}

/// Why a backend does not serve.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// It breaks the protocol, refuses something, or is gone.
    #[error("the backend of {name} failed to {action}: {reason}")]
    Backend {
        /// The device.
        name: String,
        /// What was asked for.
        action: &'static str,
        /// In the library's words.
        reason: String,
    },
    /// It says nothing.
    #[error("the backend of {name} did not {action} within {} s", deadline.as_secs())]
    Deadline {
        /// The device.
        name: String,
        /// What was asked for.
        action: &'static str,
        /// How long it had.
        deadline: Duration,
    },
    /// Its memory cannot be shared with a backend.
    #[error("guest memory of {name} cannot be shared: {reason}")]
    Memory {
        /// The device.
        name: String,
        /// In the library's words.
        reason: String,
    },
}

/// A device that a vhost-user backend serves.
pub struct VhostUser {
    description: Description,
    frontend: Frontend,
    /// The frontend's connection once more, to end it.
    socket: UnixStream,
    /// What the backend can do, once it was asked.
    offer: OnceCell<Result<Offer, Error>>,
    /// For all messages that belong together.
    deadline: Duration,
    /// The queues that the backend serves now.
    serving: Vec<usize>,
    is_gone: bool,
}

#[derive(Clone, Copy, Debug)]
struct Offer {
    features: u64,
    protocol: VhostUserProtocolFeatures,
}

impl VhostUser {
    /// A device that is served by whoever is at the other end of `connection`, a Unix stream socket.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(description: Description, connection: OwnedFd) -> io::Result<Self> {
        let socket = UnixStream::from(connection);
        socket.set_nonblocking(false)?;
        let frontend = Frontend::from_stream(socket.try_clone()?, MAX_QUEUES);
        let (offer, serving) = (OnceCell::new(), Vec::new());
        Ok(Self { description, frontend, socket, offer, deadline: DEADLINE, serving, is_gone: false })
    }

    fn offer(&self) -> Result<Offer, Error> {
        let ask = || {
            let offer = self.exchange("say what it can do", negotiate);
            if let Err(error) = &offer {
                error!(%error, "the guest will not find its device");
            }
            offer
        };
        self.offer.get_or_init(ask).clone()
    }

    /// Lets `messages` use the connection, and ends it when that takes too long: the library waits for ever.
    fn exchange<T>(
        &self,
        action: &'static str,
        messages: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Error> {
        let name = || self.description.name.clone();
        let backend = |reason: String| Error::Backend { name: name(), action, reason };
        let (finished, waiting) = mpsc::channel::<()>();
        let (socket, deadline) = (&self.socket, self.deadline);
        thread::scope(|scope| {
            let watchdog = thread::Builder::new().name("vhost-user".into()).spawn_scoped(scope, move || {
                let late = waiting.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout);
                if late {
                    // Fails only when the backend has gone meanwhile.
                    let _ = socket.shutdown(Shutdown::Both);
                }
                late
            });
            let watchdog = watchdog.map_err(|error| backend(error.to_string()))?;
            let result = messages(&mut self.frontend.clone());
            drop(finished);
            match (result, watchdog.join()) {
                (Ok(value), _) => Ok(value),
                (Err(_), Ok(true)) => Err(Error::Deadline { name: name(), action, deadline }),
                (Err(error), _) => Err(backend(error.to_string())),
            }
        })
    }
}

impl VirtioDevice for VhostUser {
    fn kind(&self) -> u32 {
        self.description.kind
    }

    fn meet_backend(&self) -> Result<(), ActivateError> {
        Ok(self.offer().map(drop)?)
    }

    /// None when the backend does not answer.
    fn features(&self) -> u64 {
        self.offer().map_or(0, |offer| offer.features & self.description.features)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.description.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        match &self.description.config {
            Config::Fixed(space) => config_space::read(space, offset, data),
            Config::Backend(size) => {
                let ask = |frontend: &mut Frontend| {
                    let room = vec![0; *size as usize];
                    frontend.get_config(0, *size, VhostUserConfigFlags::empty(), &room).map(|(_, space)| space)
                };
                let space = self.offer().and_then(|_| self.exchange("tell its configuration", ask));
                if let Err(error) = &space {
                    error!(%error, "the guest reads zeros");
                }
                config_space::read(&space.unwrap_or_default(), offset, data);
            }
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Config::Backend(size) = self.description.config else { return };
        if offset.saturating_add(data.len() as u64) > size.into() {
            return;
        }
        let set = |frontend: &mut Frontend| frontend.set_config(offset as u32, VhostUserConfigFlags::WRITABLE, data);
        if let Err(error) = self.exchange("change its configuration", set) {
            error!(%error, "the guest's change is lost");
        }
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        let offer = self.offer()?;
        let memory = |reason: String| Error::Memory { name: self.description.name.clone(), reason };
        // A private mapping cannot be shared: a read-only image that the guest has as memory.
        let shared = driver.memory.iter().filter(|region| region.flags() & libc::MAP_SHARED != 0);
        let regions = shared.map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions: Vec<_> = regions.collect::<Result<_, _>>().map_err(|error| memory(error.to_string()))?;
        let rings = driver.queues.iter().enumerate().filter(|(_, queue)| queue.ready());
        let rings: Vec<(usize, &Queue, VringConfigData)> = rings
            .map(|(index, queue)| Ok((index, queue, addresses(queue, &driver)?)))
            .collect::<Result<_, vm_memory::GuestMemoryError>>()
            .map_err(|error| memory(error.to_string()))?;
        let protocol_features = offer.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = driver.features | 1 << VIRTIO_F_VERSION_1 | protocol_features;
        self.serving = rings.iter().map(|(index, ..)| *index).collect();
        self.exchange("start", |frontend| {
            frontend.set_features(features)?;
            share_memory(frontend, &regions, offer)?;
            for (index, queue, addresses) in &rings {
                frontend.set_vring_num(*index, queue.size())?;
                frontend.set_vring_addr(*index, addresses)?;
                frontend.set_vring_base(*index, queue.next_avail())?;
                frontend.set_vring_call(*index, driver.interrupt.line())?;
                frontend.set_vring_kick(*index, &driver.kicks[*index])?;
            }
            // Without the feature they are enabled when they are kicked.
            if protocol_features != 0 {
                rings.iter().try_for_each(|(index, ..)| frontend.set_vring_enable(*index, true))?;
            }
            // A backend works in order, and hangs up on what it refuses: an answer to this is one to all.
            frontend.get_features()
        })?;
        debug!(device = self.description.name, features, "the backend serves");
        Ok(())
    }

    fn watches(&self) -> Vec<Watch> {
        // An edge: it stays gone. Its answers are read by whoever has asked.
        let events = EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        vec![Watch { descriptor: self.socket.as_raw_fd(), events, token: 0 }]
    }

    /// Nobody asks us: the queue's eventfd is the backend's.
    fn queue_notified(&mut self, _queue: usize) {}

    fn event(&mut self, event: Event) {
        let gone = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        if event.events.intersects(gone) && !self.is_gone {
            self.is_gone = true;
            error!(device = self.description.name, "the backend is gone, the guest's requests will not be answered");
        }
    }

    fn is_served_elsewhere(&self) -> bool {
        true
    }

    fn reset(&mut self) {
        let serving = std::mem::take(&mut self.serving);
        if serving.is_empty() || self.is_gone {
            return;
        }
        // The answer is that it has stopped.
        let stop =
            |frontend: &mut Frontend| serving.iter().try_for_each(|index| frontend.get_vring_base(*index).map(drop));
        if let Err(error) = self.exchange("stop", stop) {
            error!(%error, "its connection is closed");
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![("serving_queues", self.serving.len() as u64), ("backend_gone", self.is_gone.into())]
    }
}

fn negotiate(frontend: &mut Frontend) -> vhost::Result<Offer> {
    frontend.set_owner()?;
    let features = frontend.get_features()?;
    let mut protocol = VhostUserProtocolFeatures::empty();
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
        protocol = frontend.get_protocol_features()? & PROTOCOL_FEATURES;
        frontend.set_protocol_features(protocol)?;
    }
    Ok(Offer { features, protocol })
}

/// Shares guest memory, and hears whether the backend could map it where it can say so.
fn share_memory(frontend: &Frontend, regions: &[VhostUserMemoryRegionInfo], offer: Offer) -> vhost::Result<()> {
    if offer.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    let shared = frontend.set_mem_table(regions);
    frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
    shared.map(drop)
}

/// Where a queue is in this process, which the backend translates by the memory table.
fn addresses(queue: &Queue, driver: &Driver) -> Result<VringConfigData, vm_memory::GuestMemoryError> {
    let host = |address| driver.memory.get_host_address(GuestAddress(address)).map(|pointer| pointer as u64);
    Ok(VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        desc_table_addr: host(queue.desc_table())?,
        avail_ring_addr: host(queue.avail_ring())?,
        used_ring_addr: host(queue.used_ring())?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        path::PathBuf,
    };

    use caisson_vmm_launcher::{virtiofsd::connected_listener, vsock::VsockBackend};
    use tempfile::TempDir;
    use virtio_bindings::{
        virtio_ids::VIRTIO_ID_VSOCK,
        virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
    };

    use super::*;
    use crate::virtio::fake_driver::{BUFFERS, EventLoop, FakeDriver, Piece};

    const GUEST_CID: u64 = 52;
    const QUEUE_SIZES: [u16; 3] = [256; 3];
    /// `VIRTIO_VSOCK_OP_REQUEST`, at its place in a packet.
    const OPERATION: (usize, u8) = (30, 1);

    fn device(connection: OwnedFd) -> VhostUser {
        let description = Description {
            name: "a test".into(),
            kind: VIRTIO_ID_VSOCK,
            features: 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << 12,
            queue_sizes: QUEUE_SIZES.to_vec(),
            config: Config::Backend(8),
        };
        VhostUser::new(description, connection).unwrap()
    }

    /// A device that the launcher library's vsock backend serves, for want of a simpler one.
    struct Machine {
        device: VhostUser,
        driver: FakeDriver,
        backend: VsockBackend,
        socket: PathBuf,
        _directory: TempDir,
    }

    impl Machine {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("vsock");
            let (listener, connection) = connected_listener(&directory.path().join("vhost")).unwrap();
            let backend = VsockBackend::start(listener, &socket, GUEST_CID).unwrap();
            let (device, driver) = (device(connection), FakeDriver::new(&QUEUE_SIZES));
            Self { device, driver, backend, socket, _directory: directory }
        }

        /// With a driver that starts afresh.
        fn activate(&mut self) {
            self.driver = FakeDriver::new(&QUEUE_SIZES);
            let features = self.device.features();
            self.device.activate(self.driver.driver(features)).unwrap();
        }

        /// Has a host program connect, and answers the packet that the guest gets of it.
        fn packet_to_the_guest(&mut self) -> Vec<u8> {
            let mut program = UnixStream::connect(&self.socket).unwrap();
            program.write_all(b"CONNECT 1024\n").unwrap();
            self.driver.rings[0].offer_chain(&[Piece::Writable(BUFFERS, 4096)]);
            self.driver.kicks[0].write(1).unwrap();
            self.driver.wait_for_interrupt();
            let (_, length) = self.driver.rings[0].used().unwrap();
            self.driver.read(BUFFERS, length as usize)
        }
    }

    #[test]
    fn only_features_that_both_sides_know_are_offered() {
        let machine = Machine::new();
        assert_eq!(machine.device.features(), 1 << VIRTIO_RING_F_INDIRECT_DESC);
        assert_ne!(machine.device.offer().unwrap().features & 1 << VIRTIO_RING_F_EVENT_IDX, 0);
    }

    #[test]
    fn the_backend_tells_its_configuration() {
        let machine = Machine::new();
        let mut config = [0xff; 12];
        machine.device.read_config(0, &mut config);
        assert_eq!(config[..8], GUEST_CID.to_le_bytes());
        assert_eq!(config[8..], [0; 4]);
    }

    #[test]
    fn the_backend_serves_the_driver() {
        let mut machine = Machine::new();
        machine.activate();
        assert_eq!(machine.packet_to_the_guest()[OPERATION.0], OPERATION.1);
    }

    #[test]
    fn a_backend_without_a_driver_leaves_memory_alone() {
        let mut machine = Machine::new();
        machine.activate();
        machine.device.reset();
        machine.driver.rings[0].offer_chain(&[Piece::Writable(BUFFERS, 4096)]);
        machine.driver.kicks[0].write(1).unwrap();
        let mut program = UnixStream::connect(&machine.socket).unwrap();
        program.write_all(b"CONNECT 1024\n").unwrap();
        // Ends what the program waits for, when it has been looked at.
        drop(machine.backend);
        assert_eq!(program.read(&mut [0]).unwrap_or(0), 0);
        assert_eq!(machine.driver.rings[0].used(), None);
    }

    #[test]
    fn the_backend_serves_the_next_driver_too() {
        let mut machine = Machine::new();
        machine.activate();
        machine.device.reset();
        machine.activate();
        assert_eq!(machine.packet_to_the_guest()[OPERATION.0], OPERATION.1);
    }

    #[test]
    fn the_end_of_a_backend_is_noticed() {
        let mut machine = Machine::new();
        machine.activate();
        let events = EventLoop::new(&machine.device, &machine.driver);
        drop(machine.backend);
        events.step(&mut machine.device, &machine.driver);
        assert!(machine.device.metrics().contains(&("backend_gone", 1)));
        machine.device.reset();
    }

    #[test]
    fn a_backend_that_hangs_up_is_an_error() {
        let (ours, _) = UnixStream::pair().unwrap();
        let mut device = device(ours.into());
        assert_eq!(device.features(), 0);
        let error = device.activate(FakeDriver::new(&QUEUE_SIZES).driver(0)).unwrap_err().to_string();
        assert!(error.starts_with("the backend of a test failed to say what it can do: "), "{error}");
    }

    #[test]
    fn a_backend_that_says_nothing_is_an_error_after_a_while() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut device = device(ours.into());
        device.deadline = Duration::from_millis(20);
        let error = device.offer().unwrap_err();
        assert!(matches!(error, Error::Deadline { .. }), "{error}");
    }

    #[test]
    fn a_backend_that_talks_nonsense_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[0xaa; 64]).unwrap();
        let error = device(ours.into()).offer().unwrap_err();
        assert!(matches!(error, Error::Backend { .. }), "{error}");
    }
}
