//! The host's side of a network card: queues of its tap, and for each the kernel's vhost-net where that can be had. Frames
//! go then between guest and tap without QEMU.

use std::{fs::OpenOptions, io, os::fd::OwnedFd};

use caisson_protocol::vmm::Net;
use caisson_vmm_launcher::{Result, tap};
use tracing::info;

use crate::accelerator::Accelerator;

const VHOST_NET: &str = "/dev/vhost-net";

/// For QEMU.
#[derive(Debug)]
pub struct Card {
    /// One for each pair of queues.
    pub taps: Vec<OwnedFd>,
    /// As many, or none.
    pub vhosts: Vec<OwnedFd>,
}

impl Card {
    /// Opens what `net` needs. Only a guest of KVM is interrupted by vhost-net without QEMU's help.
    ///
    /// # Errors
    /// When the tap cannot be opened.
    pub fn open(net: &Net, accelerator: Accelerator) -> Result<Self> {
        let taps = tap::open(net)?;
        let vhosts = match accelerator {
            Accelerator::Kvm => vhosts(taps.len()).unwrap_or_else(|error| {
                info!(%error, tap = net.tap, "{VHOST_NET} cannot be used, QEMU moves the card's frames");
                Vec::new()
            }),
            Accelerator::Tcg => Vec::new(),
        };
        Ok(Self { taps, vhosts })
    }
}

fn vhosts(count: usize) -> io::Result<Vec<OwnedFd>> {
    let open = |_| Ok(OpenOptions::new().read(true).write(true).open(VHOST_NET)?.into());
    (0..count).map(open).collect()
}
