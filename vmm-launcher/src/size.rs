//! How big a VM is: as it was made, as it is now, and as it can become while it runs.

use caisson_protocol::vmm::{VmConfig, device::Kind};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Processors and memory.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Size {
    /// How many vCPUs.
    pub vcpus: u32,
    /// How much memory, in MiB.
    pub memory_mib: u64,
}

impl Size {
    /// As `vm` is to be made.
    pub fn of(vm: &VmConfig) -> Self {
        Self { vcpus: vm.vcpus, memory_mib: vm.memory_mib }
    }
}

/// The sizes of one VM. What a launcher remembers for the next one.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// As it was made; it never gets smaller.
    pub first: Size,
    /// It never gets larger.
    pub most: Size,
    /// As it is.
    pub now: Size,
    /// Whether it has a balloon, which takes memory from the guest.
    pub balloon: bool,
}

impl Sizes {
    /// Those of a new `vm`.
    pub fn of(vm: &VmConfig) -> Self {
        let first = Size::of(vm);
        let most = Size { vcpus: vm.vcpus.max(vm.max_vcpus), memory_mib: vm.memory_mib.max(vm.max_memory_mib) };
        let balloon = vm.devices.iter().any(|device| matches!(device.kind, Some(Kind::Balloon(_))));
        Self { first, most, now: first, balloon }
    }

    /// # Errors
    /// When the VM cannot have so many.
    pub fn can_have_vcpus(&self, wanted: u32) -> Result<()> {
        let (least, most) = (self.first.vcpus, self.most.vcpus);
        if (least..=most).contains(&wanted) {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{wanted} vCPUs cannot be had while the VM runs: {least} to {most}, which its max_vcpus says"
        )))
    }

    /// # Errors
    /// When the VM cannot have so much.
    pub fn can_have_memory(&self, wanted_mib: u64) -> Result<()> {
        let (least, most) = (self.first.memory_mib, self.most.memory_mib);
        if (least..=most).contains(&wanted_mib) {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{wanted_mib} MiB of memory cannot be had while the VM runs: {least} to {most}, which its max_memory_mib says"
        )))
    }

    /// # Errors
    /// When there is no balloon that can hold so much: it takes from the memory that the VM was made with.
    pub fn can_give(&self, wanted_mib: u64) -> Result<()> {
        let most = self.first.memory_mib;
        if wanted_mib >= most {
            return Err(Error::Invalid(format!("a balloon cannot hold {wanted_mib} MiB of a guest's {most} MiB")));
        }
        if !self.balloon {
            return Err(no_balloon());
        }
        Ok(())
    }
}

/// What is said of a VM whose balloon is to be resized and that has none.
pub fn no_balloon() -> Error {
    Error::Invalid("the VM has no balloon device".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(max_vcpus: u32, max_memory_mib: u64) -> Sizes {
        Sizes::of(&VmConfig { vcpus: 2, max_vcpus, memory_mib: 256, max_memory_mib, ..Default::default() })
    }

    #[test]
    fn a_vm_can_have_what_lies_between_its_first_size_and_its_most() {
        let sizes = sizes(4, 512);
        assert!([2, 3, 4].iter().all(|vcpus| sizes.can_have_vcpus(*vcpus).is_ok()));
        assert!([256, 300, 512].iter().all(|mib| sizes.can_have_memory(*mib).is_ok()));
        assert!(sizes.can_have_vcpus(1).is_err() && sizes.can_have_vcpus(5).is_err());
        assert!(sizes.can_have_memory(255).is_err() && sizes.can_have_memory(513).is_err());
    }

    #[test]
    fn a_vm_without_a_most_keeps_its_size() {
        let refusal = sizes(0, 0).can_have_memory(512).unwrap_err().to_string();
        assert_eq!(
            refusal,
            "512 MiB of memory cannot be had while the VM runs: 256 to 256, which its max_memory_mib says"
        );
        assert!(sizes(0, 0).can_have_vcpus(2).is_ok());
    }
}
