//! The virtio socket device: the launcher library's engine, with this VMM's queues.

use std::{os::fd::AsRawFd, path::Path};

use caisson_protocol::{address::HYBRID_CID, vmm};
use caisson_vmm_launcher::{Result, vsock::VsockDevice};
use tracing::warn;
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_VSOCK,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;

use super::{Driver, Event, VirtioDevice, Watch, config_space, device::ActivateError};

/// Receive, transmit and event queue (virtio 1.2 §5.10.2). The device has no event to send.
const QUEUE_SIZES: [u16; 3] = [256, 256, 4];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A virtio socket device.
pub struct Vsock {
    device: VsockDevice,
    received_packets: u64,
    sent_packets: u64,
    active: Option<Driver>,
}

impl Vsock {
    /// Serves host programs on the Unix socket that `vsock` names, which exists until this is dropped.
    ///
    /// # Errors
    /// When the socket's path is too long or cannot be bound.
    pub fn open(vsock: &vmm::Vsock) -> Result<Self> {
        let device = VsockDevice::new(Path::new(&vsock.socket), HYBRID_CID.into())?;
        Ok(Self { device, received_packets: 0, sent_packets: 0, active: None })
    }

    /// Moves packets both ways. Whatever it was that woke us: a busy guest must not keep the host's programs waiting.
    fn pass(&mut self) {
        self.device.handle_host_events();
        let Some(driver) = &mut self.active else { return };
        let [receive, transmit, ..] = driver.queues.as_mut_slice() else { return };
        if !receive.ready() || !transmit.ready() {
            return;
        }
        let before = (receive.next_used(), transmit.next_used());
        match self.device.process(&driver.memory, receive, transmit) {
            Ok(progress) => {
                self.received_packets += u64::from(receive.next_used().wrapping_sub(before.0));
                self.sent_packets += u64::from(transmit.next_used().wrapping_sub(before.1));
                if progress.interrupt_rx || progress.interrupt_tx {
                    driver.interrupt.used_buffers();
                }
                if progress.more {
                    // So that other devices get their turn before we go on. Fails only when it is written already.
                    let _ = driver.kicks[TRANSMIT].write(1);
                }
            }
            Err(error) => {
                warn!(%error, "the guest's vsock queues are broken, its sockets stop");
                self.active = None;
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.device.config(), offset, data);
    }

    fn activate(&mut self, mut driver: Driver) -> Result<(), ActivateError> {
        let event_idx = driver.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        driver.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
        self.active = Some(driver);
        Ok(())
    }

    fn watches(&self) -> Vec<Watch> {
        vec![Watch { descriptor: self.device.as_raw_fd(), events: EventSet::IN, token: 0 }]
    }

    fn queue_notified(&mut self, queue: usize) {
        if [RECEIVE, TRANSMIT].contains(&queue) {
            self.pass();
        }
    }

    fn event(&mut self, _event: Event) {
        self.pass();
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![("received_packets_total", self.received_packets), ("sent_packets_total", self.sent_packets)]
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::{UnixListener, UnixStream},
    };

    use tempfile::TempDir;

    use super::*;
    use crate::virtio::fake_driver::{BUFFERS, EventLoop, FakeDriver, Piece};

    const OUTGOING: u64 = BUFFERS + 0x10_0000;
    const HEADER_SIZE: usize = 44;
    const REQUEST: u16 = 1;
    const RESPONSE: u16 = 2;
    const READ_WRITE: u16 = 5;

    /// A device with its driver, in use, and its host directory.
    struct Machine {
        device: Vsock,
        driver: FakeDriver,
        events: EventLoop,
        directory: TempDir,
    }

    impl Machine {
        fn start() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("v").to_str().unwrap().into();
            let mut device = Vsock::open(&vmm::Vsock { socket, ..Default::default() }).unwrap();
            let driver = FakeDriver::new(&QUEUE_SIZES);
            device.activate(driver.driver(device.features())).unwrap();
            let events = EventLoop::new(&device, &driver);
            Self { device, driver, events, directory }
        }

        /// Sends a packet from the guest's port 1 to the host's port 9.
        fn send(&mut self, operation: u16, payload: &[u8]) {
            let mut packet = Vec::new();
            packet.extend(u64::from(HYBRID_CID).to_le_bytes());
            packet.extend(2u64.to_le_bytes());
            [1, 9, payload.len() as u32].iter().for_each(|field| packet.extend(field.to_le_bytes()));
            [1, operation].iter().for_each(|field| packet.extend(field.to_le_bytes()));
            [0, 1 << 16, 0].iter().for_each(|field: &u32| packet.extend(field.to_le_bytes()));
            packet.extend(payload);
            self.driver.write(OUTGOING, &packet);
            self.driver.rings[TRANSMIT].offer_chain(&[Piece::Readable(OUTGOING, packet.len() as u32)]);
            self.driver.kicks[TRANSMIT].write(1).unwrap();
        }

        /// Waits for a packet to the guest: its operation and payload.
        fn receive(&mut self) -> (u16, Vec<u8>) {
            self.driver.rings[RECEIVE].offer_chain(&[Piece::Writable(BUFFERS, 4096)]);
            self.driver.kicks[RECEIVE].write(1).unwrap();
            loop {
                if let Some((_, length)) = self.driver.rings[RECEIVE].used() {
                    let packet = self.driver.read(BUFFERS, length as usize);
                    return (u16::from_le_bytes([packet[30], packet[31]]), packet[HEADER_SIZE..].to_vec());
                }
                self.events.step(&mut self.device, &self.driver);
            }
        }
    }

    #[test]
    fn the_configuration_has_the_context_id() {
        let machine = Machine::start();
        let mut config = [0xff; 8];
        machine.device.read_config(0, &mut config);
        assert_eq!(config, u64::from(HYBRID_CID).to_le_bytes());
    }

    #[test]
    fn a_guest_that_dials_reaches_the_program_that_listens() {
        let mut machine = Machine::start();
        let listener = UnixListener::bind(machine.directory.path().join("v_9")).unwrap();
        machine.send(REQUEST, &[]);
        assert_eq!(machine.receive().0, RESPONSE);
        let (mut program, _) = listener.accept().unwrap();
        program.write_all(b"from the host").unwrap();
        assert_eq!(machine.receive(), (READ_WRITE, b"from the host".to_vec()));
        assert!(machine.driver.was_interrupted());
        machine.send(READ_WRITE, b"from the guest");
        machine.events.step(&mut machine.device, &machine.driver);
        let mut bytes = [0; 14];
        program.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"from the guest");
        let metrics = machine.device.metrics();
        assert_eq!(metrics, [("received_packets_total", 2), ("sent_packets_total", 2)]);
    }

    #[test]
    fn a_program_that_connects_dials_the_guest() {
        let mut machine = Machine::start();
        let mut program = UnixStream::connect(machine.directory.path().join("v")).unwrap();
        program.write_all(b"CONNECT 1024\n").unwrap();
        assert_eq!(machine.receive().0, REQUEST);
    }

    #[test]
    fn a_device_with_broken_queues_rests_until_it_is_reset() {
        let mut machine = Machine::start();
        machine.driver.rings[TRANSMIT].set_available(999);
        machine.device.queue_notified(TRANSMIT);
        machine.device.queue_notified(RECEIVE);
        machine.device.reset();

        machine.driver = FakeDriver::new(&QUEUE_SIZES);
        machine.device.activate(machine.driver.driver(0)).unwrap();
        machine.events = EventLoop::new(&machine.device, &machine.driver);
        let mut program = UnixStream::connect(machine.directory.path().join("v")).unwrap();
        program.write_all(b"CONNECT 1024\n").unwrap();
        assert_eq!(machine.receive().0, REQUEST);
    }

    #[test]
    fn a_queue_that_the_driver_did_not_set_up_is_left_alone() {
        let mut machine = Machine::start();
        let driver = FakeDriver::new(&QUEUE_SIZES);
        let mut device_side = driver.driver(0);
        device_side.queues.iter_mut().for_each(|queue| queue.set_ready(false));
        machine.device.activate(device_side).unwrap();
        machine.device.queue_notified(TRANSMIT);
        assert_eq!(driver.read(0, BUFFERS as usize), vec![0; BUFFERS as usize]);
    }

    #[test]
    fn a_path_that_is_too_long_is_refused() {
        let socket = format!("/tmp/{}", "s".repeat(100));
        let error = Vsock::open(&vmm::Vsock { socket, ..Default::default() }).err().unwrap().to_string();
        assert!(error.contains("is too long: 105 bytes"), "{error}");
    }
}
