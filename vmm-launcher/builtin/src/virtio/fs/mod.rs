//! The virtio file system device (virtio 1.2 §5.11): a host directory that the guest mounts by its tag.
//!
//! Two ways to serve it: [`over_vhost_user`], by virtiofsd in a confined process of its own, and [`InProcess`], by threads of
//! this process, which costs no process and confines nothing.

mod in_process;

use std::os::fd::OwnedFd;

use caisson_protocol::vmm;
use caisson_vmm_launcher::{Error, Result};
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_FS,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

pub use self::in_process::InProcess;
use super::vhost_user::{Config, Description, VhostUser};

/// `struct virtio_fs_config`, virtio 1.2 §5.11.4.
const TAG_SIZE: usize = 36;
/// High priority requests, and the others. Linux sends requests of up to 1 MiB when they fit into the queue: one descriptor
/// for each page.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
const REQUEST_QUEUES: u32 = 1;
const FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The device for `fs`, served by the virtiofsd at the other end of `connection`.
///
/// # Errors
/// When the process is out of descriptors.
pub fn over_vhost_user(fs: &vmm::Fs, connection: OwnedFd) -> Result<VhostUser> {
    let description = Description {
        name: format!("share \"{}\"", fs.tag),
        kind: VIRTIO_ID_FS,
        features: FEATURES,
        queue_sizes: QUEUE_SIZES.to_vec(),
        config: Config::Fixed(config_space(&fs.tag)),
    };
    VhostUser::new(description, connection)
        .map_err(Error::host(format!("connect to the file server of \"{}\"", fs.tag)))
}

fn config_space(tag: &str) -> Vec<u8> {
    let mut space = tag.as_bytes().to_vec();
    space.resize(TAG_SIZE, 0);
    space.extend(REQUEST_QUEUES.to_le_bytes());
    space
}
