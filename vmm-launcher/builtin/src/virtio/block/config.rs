//! What a disk tells its driver: `struct virtio_blk_config` (virtio 1.2 §5.2.4), and features.

use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use super::request::MAX_RANGE_SECTORS;
use crate::virtio::image::{Image, SECTOR_BYTES};

/// Up to and with `unused1`.
pub const SPACE_BYTES: usize = 60;

/// The most buffers of data in a request: a request of 1 MiB in the guest's scattered pages, near enough.
const MAX_DATA_SEGMENTS: u32 = 254;

/// The feature bits of a disk with `image`.
pub fn features(image: &Image) -> u64 {
    let always = [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
    ];
    let only_read = [VIRTIO_BLK_F_RO].as_slice();
    let also_written = [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES].as_slice();
    let by_access = if image.is_read_only { only_read } else { also_written };
    always.iter().chain(by_access).fold(0, |features, bit| features | 1 << bit)
}

/// The configuration space of a disk with `image`.
pub fn space(image: &Image) -> [u8; SPACE_BYTES] {
    let mut space = [0; SPACE_BYTES];
    let mut put = |offset: usize, value: &[u8]| space[offset..offset + value.len()].copy_from_slice(value);
    let blocks_per_physical = image.physical_block_bytes / image.logical_block_bytes;
    let sectors_per_physical = image.physical_block_bytes / SECTOR_BYTES as u32;

    put(0, &(image.len / SECTOR_BYTES).to_le_bytes()); // capacity
    put(12, &MAX_DATA_SEGMENTS.to_le_bytes()); // seg_max
    put(20, &image.logical_block_bytes.to_le_bytes()); // blk_size
    put(24, &[blocks_per_physical.ilog2() as u8]); // topology.physical_block_exp
    put(26, &(blocks_per_physical as u16).to_le_bytes()); // topology.min_io_size
    put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &1_u32.to_le_bytes()); // max_discard_seg
    put(44, &sectors_per_physical.to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &1_u32.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    space
}
