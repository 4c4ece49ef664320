//! Which device answers at an address: ports and memory-mapped registers.

use std::{ops::Range, sync::Arc};

/// Something that the guest reaches through registers. Called from any vCPU's thread; the guest chooses offset and length.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what is at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes what the guest wrote at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// An address space with devices in it. It does not change once the VM runs.
#[derive(Default)]
pub struct Bus(Vec<(Range<u64>, Arc<dyn BusDevice>)>);

impl Bus {
    /// Puts `device` at `range`, which is free.
    pub fn insert(&mut self, range: Range<u64>, device: Arc<dyn BusDevice>) {
        let place = self.0.partition_point(|(taken, _)| taken.start < range.start);
        debug_assert!(self.0.get(place).is_none_or(|(next, _)| range.end <= next.start));
        self.0.insert(place, (range, device));
    }

    /// Reads; an address without a device reads as all ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; nothing happens at an address without a device.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let after = self.0.partition_point(|(range, _)| range.start <= address);
        let (range, device) = &self.0[after.checked_sub(1)?];
        range.contains(&address).then(|| (device.as_ref(), address - range.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its name.
    struct Named(u8);

    impl BusDevice for Named {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }

        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn read(address: u64) -> u8 {
        let mut bus = Bus::default();
        bus.insert(0x20..0x30, Arc::new(Named(b'h')));
        bus.insert(0x10..0x18, Arc::new(Named(b'a')));
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn a_device_answers_at_its_first_address() {
        assert_eq!(read(0x10), b'a');
    }

    #[test]
    fn a_device_is_told_the_offset() {
        assert_eq!(read(0x2f), b'h' + 15);
    }

    #[test]
    fn a_gap_between_devices_reads_as_ones() {
        assert_eq!(read(0x18), 0xff);
    }

    #[test]
    fn an_address_below_all_devices_reads_as_ones() {
        assert_eq!(read(0), 0xff);
    }
}
