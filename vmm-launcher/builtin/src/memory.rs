//! The guest's physical memory.

use std::{fs, fs::File, io, sync::Arc};

use caisson_protocol::vmm::VmConfig;
use caisson_vmm_launcher::{Error, Result};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use rustix::{
    fs::{Mode, OFlags, openat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen},
};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::arch::layout::{HIGH_RAM, LOW_RAM_END};

/// The guest's physical memory; a clone is another handle to the same mappings. Each region is backed by a file
/// descriptor ([`vm_memory::GuestMemoryRegion::file_offset`]), so that it can be shared with another process.
pub type GuestMemory = GuestMemoryMmap<()>;

/// What memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Of the host's ordinary pages, taken when the guest first touches them: many at a time where the host does that for
    /// its own programs.
    Ordinary,
    /// Of the host's huge pages of 2 MiB, all kept for this guest from the start.
    Huge,
}

impl Pages {
    /// What `vm` asks for.
    pub fn of(vm: &VmConfig) -> Self {
        if vm.huge_pages { Self::Huge } else { Self::Ordinary }
    }
}

/// [`allocate_as`] of ordinary pages.
///
/// # Errors
/// As there.
pub fn allocate(mib: u64) -> Result<GuestMemory> {
    allocate_as(mib, Pages::Ordinary)
}

/// Makes `mib` MiB of memory of these pages, below and above the hole for devices.
///
/// # Errors
/// When the host does not have that much, or refuses it.
pub fn allocate_as(mib: u64, pages: Pages) -> Result<GuestMemory> {
    let host_mib = nix::sys::sysinfo::sysinfo()
        .map_err(|error| Error::host("ask for the host's memory")(error.into()))?
        .ram_total()
        >> 20;
    if mib > host_mib {
        return Err(Error::Invalid(format!("{mib} MiB of memory cannot be had: this machine has {host_mib} MiB")));
    }
    map(mib << 20, pages).map_err(Error::host(format!("make {mib} MiB of guest memory")))
}

/// Tells KVM what is where.
///
/// # Errors
/// When KVM refuses.
pub fn give_to_kvm(memory: &GuestMemory, vm: &VmFd) -> Result<()> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped with this size, and the machine keeps `memory` until its vCPUs have ended. Nothing
        // in this process holds a reference into it: the guest writes there at any time.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(|error| Error::host("give the guest its memory")(error.into()))?;
    }
    Ok(())
}

/// The first address after all memory.
pub fn end(memory: &GuestMemory) -> u64 {
    memory.last_addr().0 + 1
}

/// The end of the memory that begins at address 0.
pub fn low_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

fn map(bytes: u64, pages: Pages) -> io::Result<GuestMemory> {
    let memfd = |flags| memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC | flags).map(File::from);
    let (file, of_mapping) = match pages {
        Pages::Ordinary => {
            let file = if host_joins_pages() { file_of_joined_pages().ok() } else { None };
            (file.map_or_else(|| memfd(MFdFlags::empty()), Ok)?, libc::MAP_NORESERVE)
        }
        // Without a reserve, a guest would be ended by SIGBUS when others have taken its pages.
        Pages::Huge => (memfd(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)?, 0),
    };
    file.set_len(bytes)?;
    let file = Arc::new(file);
    let region = |start: u64, offset: u64, size: u64| {
        let backing = FileOffset::from_arc(file.clone(), offset);
        let (access, sharing) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | of_mapping);
        let mapping = MmapRegion::build(Some(backing), size as usize, access, sharing).map_err(io::Error::other)?;
        GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(io::Error::from(io::ErrorKind::InvalidInput))
    };
    let low = bytes.min(LOW_RAM_END);
    let mut regions = vec![region(0, 0, low)?];
    if bytes > low {
        regions.push(region(HIGH_RAM, low, bytes - low)?);
    }
    GuestMemory::from_regions(regions).map_err(io::Error::other)
}

/// Whether programs of this host get huge pages without asking: Documentation/admin-guide/mm/transhuge.rst.
fn host_joins_pages() -> bool {
    let policy = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    policy.is_ok_and(|policy| policy.contains("[always]"))
}

/// A file in memory like a memfd, which gets huge pages as a program's own memory does. The policy for memfds is a setting of
/// its own, and commonly off; a file system of one's own has its own policy.
///
/// # Errors
/// Without the right to mount.
fn file_of_joined_pages() -> io::Result<File> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, "huge", "always")?;
    // The guest's memory has its own limit.
    fsconfig_set_string(&tmpfs, "size", "0")?;
    fsconfig_create(&tmpfs)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // Nowhere mounted and without a name, it goes with its last user.
    Ok(openat(root, c".", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(memory: &GuestMemory) -> Vec<(u64, u64)> {
        memory.iter().map(|region| (region.start_addr().0, region.len())).collect()
    }

    #[test]
    fn small_memory_is_one_region() {
        assert_eq!(regions(&allocate(128).unwrap()), [(0, 128 << 20)]);
    }

    #[test]
    fn large_memory_goes_on_above_4_gib() {
        let memory = map(5 << 30, Pages::Ordinary).unwrap();
        assert_eq!(regions(&memory), [(0, 3 << 30), (4 << 30, 2 << 30)]);
        assert_eq!(memory.iter().map(|region| region.file_offset().unwrap().start()).collect::<Vec<_>>(), [0, 3 << 30]);
        assert_eq!(end(&memory), 6 << 30);
    }

    #[test]
    fn joined_pages_are_of_a_file_that_two_mappings_share() {
        // Only root may mount.
        let Ok(file) = file_of_joined_pages() else { return };
        file.set_len(4 << 20).unwrap();
        let map = || MmapRegion::<()>::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 4 << 20).unwrap();
        let (one, other) = (map(), map());
        use vm_memory::{Bytes, VolatileMemory};
        one.as_volatile_slice().write_obj(7_u8, 0).unwrap();
        assert_eq!(other.as_volatile_slice().read_obj::<u8>(0).unwrap(), 7);
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_what_it_has() {
        let error = allocate(1 << 30).unwrap_err().to_string();
        assert!(error.starts_with("1073741824 MiB of memory cannot be had: this machine has "), "{error}");
    }
}
