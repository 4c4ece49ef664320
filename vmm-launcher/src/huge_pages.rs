//! The host's huge pages as guests' memory: one size, reserved beforehand, taken when a VM is made.

use std::{
    fs,
    path::{Path, PathBuf},
};

use caisson_protocol::vmm::VmConfig;

use crate::{Error, Result, hypervisor::Hypervisor};

/// The size that every x86-64 processor has and every hypervisor takes, in MiB.
pub const SIZE_MIB: u64 = 2;
/// The kernel's pool of them, Documentation/admin-guide/mm/hugetlbpage.rst.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Makes `vm`'s memory a whole number of huge pages when it asks for them, and sees that there are enough.
///
/// # Errors
/// When `H` takes none, or there are too few.
pub(crate) fn prepare<H: Hypervisor>(vm: &mut VmConfig) -> Result<()> {
    if !vm.huge_pages {
        return Ok(());
    }
    H::HUGE_PAGES.map_err(|why| Error::Unsupported(format!("{} guests get no huge pages: {why}", H::NAME)))?;
    for mib in [&mut vm.memory_mib, &mut vm.max_memory_mib] {
        *mib = mib.next_multiple_of(SIZE_MIB);
    }
    can_take(vm.memory_mib)
}

/// Sees that there are enough of them for so much more memory, in MiB.
///
/// # Errors
/// When there are too few; it says where more are reserved.
pub fn can_take(memory_mib: u64) -> Result<()> {
    enough(memory_mib, Path::new(POOL))
}

fn enough(memory_mib: u64, pool: &Path) -> Result<()> {
    let number = |name: &str| -> u64 {
        let text = fs::read_to_string(pool.join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    };
    // What others have been promised is still free; what may be had beyond the reserve is not all taken by `surplus`.
    let reserved = number("free_hugepages").saturating_sub(number("resv_hugepages"));
    let more = number("nr_overcommit_hugepages").saturating_sub(number("surplus_hugepages"));
    let (wanted, free) = (memory_mib / SIZE_MIB, reserved + more);
    if free >= wanted {
        return Ok(());
    }
    let file: PathBuf = pool.join("nr_hugepages");
    Err(Error::Invalid(format!(
        "{memory_mib} MiB of memory take {wanted} huge pages of {SIZE_MIB} MiB, and this machine has {free} free: \
         reserve more in {}",
        file.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(files: &[(&str, &str)]) -> tempfile::TempDir {
        let pool = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(pool.path().join(name), text).unwrap();
        }
        pool
    }

    #[test]
    fn as_many_as_are_free_are_enough() {
        let pool = pool(&[("free_hugepages", "128\n"), ("resv_hugepages", "0\n")]);
        assert!(enough(256, pool.path()).is_ok());
    }

    #[test]
    fn what_others_were_promised_is_not_free() {
        let pool = pool(&[("free_hugepages", "128\n"), ("resv_hugepages", "28\n")]);
        let error = enough(256, pool.path()).unwrap_err().to_string();
        assert!(error.starts_with("256 MiB of memory take 128 huge pages of 2 MiB, and this machine has 100 free"));
    }

    #[test]
    fn what_can_be_had_beyond_the_reserve_counts() {
        let pool = pool(&[("nr_overcommit_hugepages", "200\n"), ("surplus_hugepages", "72\n")]);
        assert!(enough(256, pool.path()).is_ok());
    }

    #[test]
    fn a_machine_without_huge_pages_has_none() {
        assert!(enough(2, Path::new("/no/pool")).is_err());
    }
}
