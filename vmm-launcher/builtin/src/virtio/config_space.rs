//! A device's configuration space (virtio 1.2 §2.5) that never changes.

/// Fills `data` from `offset` on; what lies beyond the end of `space` reads as zero.
pub fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(space.len());
    let rest = &space[start..];
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_four(offset: u64) -> [u8; 4] {
        let mut data = [0xff; 4];
        read(&[1, 2, 3, 4, 5], offset, &mut data);
        data
    }

    #[test]
    fn bytes_come_from_the_offset_on() {
        assert_eq!(read_four(1), [2, 3, 4, 5]);
    }

    #[test]
    fn what_lies_beyond_the_end_is_zero() {
        assert_eq!(read_four(3), [4, 5, 0, 0]);
        assert_eq!(read_four(5), [0; 4]);
        assert_eq!(read_four(u64::MAX), [0; 4]);
    }
}
