//! A network card on a tap interface, virtio 1.2 §5.1.
//!
//! ```text
//!             ┌ pair 0: receive.rs  ◄── readv, frames straight into the driver's buffers ──┐
//!  driver ────┤         transmit.rs ──► writev, straight out of them ──────────────────────┼── tap.rs
//!             ├ pair 1 … one queue of the tap each                                         │
//!             └ control.rs: which pairs are in use                                         ┘
//! ```
//!
//! Nothing is copied and nothing waits here: a frame stays in the tap until the driver has room for it.

mod control;
mod frame;
mod receive;
mod tap;
mod transmit;

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, AsRawFd};

use caisson_protocol::vmm;
use caisson_vmm_launcher::{Error, Result};
use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6, c_uint};
use tracing::debug;
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
        VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::epoll::EventSet;

use self::{
    control::{Controller, enable_pairs},
    receive::Receiver,
    tap::Tap,
    transmit::Transmitter,
};
use super::{Driver, Event, VirtioDevice, Watch, config_space, device::ActivateError, virtqueue::Virtqueue};

/// `struct virtio_net_hdr_v1`.
const HEADER_SIZE: usize = 12;
/// With its header, virtio 1.2 §5.1.6.3.1.
const MAX_FRAME: usize = 65562;
/// Frames of one queue that are moved before others get their turn.
const FRAMES_PER_PASS: usize = 64;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// What every tap can do.
const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// UDP fragmentation offload.
const UFO: u64 = 1 << VIRTIO_NET_F_HOST_UFO | 1 << VIRTIO_NET_F_GUEST_UFO;
/// UDP segmentation offload.
const USO: u64 = 1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;

/// What a driver accepts from the tap, and how the tap is told.
const GUEST_OFFLOADS: [(u32, c_uint); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, TUN_F_UFO),
    (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
];

/// A network card.
pub struct Net {
    name: String,
    /// One for each pair of queues.
    taps: Vec<Tap>,
    config: [u8; 10],
    features: u64,
    queue_sizes: Vec<u16>,
    counters: Counters,
    active: Option<Active>,
}

/// What a card has counted since it was made. Bytes are without headers of virtio.
#[derive(Debug, Default)]
struct Counters {
    received_frames: u64,
    received_bytes: u64,
    /// Longer than the driver's room.
    receive_drops: u64,
    receive_errors: u64,
    sent_frames: u64,
    sent_bytes: u64,
    /// Broken, or not taken by the tap.
    send_drops: u64,
}

/// While there is a driver. None: a queue that it did not set up.
struct Active {
    pairs: Vec<(Option<Receiver>, Option<Transmitter>)>,
    controller: Option<Controller>,
}

impl Net {
    /// A card on the tap interface that `net` names, which is never made.
    ///
    /// # Errors
    /// When there is no such tap, or it cannot be used; the message says what to do.
    pub fn open(net: &vmm::Net) -> Result<Self> {
        let taps = Tap::open_queues(net)?;
        let pairs = taps.len();
        let mut config = [0; 10];
        config[..6].copy_from_slice(&parse_mac(&net.mac)?);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config[8..].copy_from_slice(&(pairs as u16).to_le_bytes());
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let features = features(&taps);
        let (counters, active) = (Counters::default(), None);
        Ok(Self { name: net.tap.clone(), taps, config, features, queue_sizes, counters, active })
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config, offset, data);
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        let accepted = |feature: u32| driver.features & 1 << feature != 0;
        // A driver without the feature has one pair, and its control queue follows that.
        let pairs = if accepted(VIRTIO_NET_F_MQ) { self.taps.len() } else { 1 };
        let offloads = GUEST_OFFLOADS.iter().filter(|(feature, _)| accepted(*feature)).map(|(_, offload)| offload);
        self.taps[0].set_offloads(offloads.fold(0, |all, offload| all | offload))?;
        enable_pairs(&self.taps, 1).ok_or("the tap interface is gone")?;

        let mergeable = accepted(VIRTIO_NET_F_MRG_RXBUF);
        let features = driver.features;
        let mut queues = Virtqueue::all(driver).into_iter();
        let mut next = || queues.next().flatten();
        let mut pair = || (next().map(|queue| Receiver::new(queue, mergeable)), next().map(Transmitter::new));
        let pairs = (0..pairs).map(|_| pair()).collect();
        let controller = next().map(Controller::new);
        debug!(tap = self.name, features, "network card in use");
        self.active = Some(Active { pairs, controller });
        Ok(())
    }

    fn watches(&self) -> Vec<Watch> {
        // An edge: a frame that the driver has no room for must not wake us again.
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let taps = (0..).zip(&self.taps);
        taps.map(|(token, tap)| Watch { descriptor: tap.as_fd().as_raw_fd(), events, token }).collect()
    }

    fn queue_notified(&mut self, queue: usize) {
        let Some(Active { pairs, controller }) = &mut self.active else { return };
        let (pair, direction) = (queue / 2, queue % 2);
        let is_control = queue == 2 * pairs.len();
        match (pairs.get_mut(pair), direction) {
            (Some((Some(receiver), _)), 0) => receiver.pass(&self.taps[pair], &mut self.counters),
            (Some((_, Some(transmitter))), 1) => transmitter.pass(&self.taps[pair], &mut self.counters),
            (None, _) if is_control => controller.iter_mut().for_each(|controller| controller.pass(&self.taps)),
            // The driver has not set it up.
            _ => {}
        }
    }

    fn event(&mut self, event: Event) {
        let pair = event.token as usize;
        let Some(Active { pairs, .. }) = &mut self.active else { return };
        if let Some((Some(receiver), _)) = pairs.get_mut(pair) {
            receiver.pass(&self.taps[pair], &mut self.counters);
        }
    }

    fn reset(&mut self) {
        self.active = None;
        // The next driver may accept less. Fails only when the tap is gone.
        let _ = self.taps[0].set_offloads(0);
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("received_frames_total", counters.received_frames),
            ("received_bytes_total", counters.received_bytes),
            ("receive_drops_total", counters.receive_drops),
            ("receive_errors_total", counters.receive_errors),
            ("sent_frames_total", counters.sent_frames),
            ("sent_bytes_total", counters.sent_bytes),
            ("send_drops_total", counters.send_drops),
        ]
    }
}

/// What a card on these queues of a tap can do. The kernel knows UFO or USO, or it does not.
fn features(taps: &[Tap]) -> u64 {
    let can = |offloads| taps[0].set_offloads(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | offloads).is_ok();
    let mut features = FEATURES;
    if can(TUN_F_UFO) {
        features |= UFO;
    }
    if can(TUN_F_USO4 | TUN_F_USO6) {
        features |= USO;
    }
    if taps.len() > 1 {
        features |= 1 << VIRTIO_NET_F_MQ;
    }
    // Until a driver says what it takes. Every tap knows none.
    let _ = taps[0].set_offloads(0);
    features
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    let mut octets = text.split(':');
    let parsed = mac.iter_mut().all(|octet| {
        let text = octets.next().filter(|text| text.len() == 2);
        text.and_then(|text| u8::from_str_radix(text, 16).ok()).map(|value| *octet = value).is_some()
    });
    match (parsed, octets.next()) {
        (true, None) => Ok(mac),
        _ => Err(Error::Invalid(format!("\"{text}\" is not a MAC address: it must be like 02:00:00:00:00:01"))),
    }
}
