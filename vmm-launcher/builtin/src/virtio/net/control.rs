//! The control queue, virtio 1.2 §5.1.6.5.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::tap::Tap;
use crate::{
    memory::GuestMemory,
    virtio::{
        buffers::{Buffers, Segments},
        virtqueue::Virtqueue,
    },
};

/// Commands that are carried out before others get their turn.
const COMMANDS_PER_PASS: usize = 16;

/// The control queue.
pub struct Controller {
    queue: Virtqueue,
}

impl Controller {
    /// No command has come yet.
    pub fn new(queue: Virtqueue) -> Self {
        Self { queue }
    }

    /// Carries out what the driver asks for, and then lets others get their turn.
    pub fn pass(&mut self, taps: &[Tap]) {
        self.queue.serve(COMMANDS_PER_PASS, |memory, _, chain| {
            let Some(mut buffers) = Buffers::of(memory, chain) else { return Some(0) };
            let done = carry_out(&mut buffers.readable, memory, taps);
            let status = if done.is_some() { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            Some(buffers.writable.write(memory, &[status as u8]) as u32)
        });
        self.queue.finish();
    }
}

/// Carries out one command; none when it is unknown or broken.
fn carry_out(command: &mut Segments, memory: &GuestMemory, taps: &[Tap]) -> Option<()> {
    let [class, number] = take(command, memory)?;
    match (class.into(), number.into()) {
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            enable_pairs(taps, u16::from_le_bytes(take(command, memory)?).into())
        }
        // A tap delivers every frame to its one reader; what the driver does not want it drops itself.
        (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
        | (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => Some(()),
        _ => None,
    }
}

fn take<const N: usize>(command: &mut Segments, memory: &GuestMemory) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    command.take(memory, &mut bytes).then_some(bytes)
}

/// Lets frames come to the first `pairs` queues only.
pub fn enable_pairs(taps: &[Tap], pairs: usize) -> Option<()> {
    if !(1..=taps.len()).contains(&pairs) {
        return None;
    }
    // A tap with one queue has no choice.
    let choice = if taps.len() > 1 { taps } else { &[] };
    choice.iter().enumerate().try_for_each(|(index, tap)| tap.set_enabled(index < pairs)).ok()
}
