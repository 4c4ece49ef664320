//! What the processor says of itself: what KVM supports, with each vCPU's place in a flat topology (one package, one thread
//! per core).

use caisson_vmm_launcher::{Error, Result};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

/// Leaf 1, ECX: the local timer fires at a given time stamp. KVM has it on every host.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: this is a guest.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: leaf 1 tells how many logical processors the package has.
const HYPER_THREADING: u32 = 1 << 28;

/// What KVM supports on this host.
///
/// # Errors
/// When KVM does not say.
pub fn supported(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| Error::host("ask KVM for the processor's features")(error.into()))
}

/// What vCPU `number` of `count` says.
pub fn of_vcpu(supported: &CpuId, number: u32, count: u32) -> CpuId {
    // Extended topology is written anew.
    let mut leaves: Vec<_> =
        supported.as_slice().iter().filter(|leaf| !matches!(leaf.function, 0xb | 0x1f)).copied().collect();
    for leaf in &mut leaves {
        set_place(leaf, number, count);
    }
    leaves.extend(extended_topology(number, count));
    CpuId::from_entries(&leaves).unwrap_or_else(|_| supported.clone())
}

fn set_place(leaf: &mut kvm_cpuid_entry2, number: u32, count: u32) {
    let others = count - 1;
    match leaf.function {
        // Feature information.
        0x1 => {
            leaf.ebx = leaf.ebx & 0xffff | count.min(255) << 16 | number << 24;
            leaf.ecx |= TSC_DEADLINE | HYPERVISOR;
            leaf.edx = leaf.edx & !HYPER_THREADING | if count > 1 { HYPER_THREADING } else { 0 };
        }
        // Intel's caches: who shares one, and how many cores there are.
        0x4 if leaf.eax & 0x1f != 0 => {
            let sharing = if leaf.eax >> 5 & 7 >= 3 { others } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14 | others.min(63) << 26;
        }
        // Performance counters: not used by guests that boot fast, and costly to emulate.
        0xa => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        // AMD's number of cores, and of bits in a core's id.
        0x8000_0008 => leaf.ecx = id_bits(count) << 12 | others,
        // AMD's caches.
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            let sharing = if leaf.eax >> 5 & 7 >= 3 { others } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14;
        }
        // AMD's ids: core, and node 0.
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (number, number, 0),
        _ => {}
    }
}

/// Leaf 0xb: threads of a core, cores of a package.
fn extended_topology(number: u32, count: u32) -> [kvm_cpuid_entry2; 2] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    [(0, THREAD, 0, 1), (1, CORE, id_bits(count), count)].map(|(index, kind, eax, ebx)| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind << 8,
        edx: number,
        ..Default::default()
    })
}

/// How many bits tell `count` ids apart.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(number: u32, count: u32, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let supported = [leaf(0x1, 0), leaf(0xb, 7), leaf(0x8000_0008, 0), leaf(0x8000_001d, 3 << 5 | 3)];
        let all = of_vcpu(&CpuId::from_entries(&supported).unwrap(), number, count);
        *all.as_slice().iter().find(|leaf| leaf.function == function && leaf.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_id() {
        assert_eq!(leaf(5, 8, 0x1, 0).ebx >> 24, 5);
        assert_eq!(leaf(5, 8, 0xb, 1).edx, 5);
    }

    #[test]
    fn cores_are_counted_in_one_package() {
        let cores = leaf(0, 6, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 6, 0x201));
        assert_eq!(leaf(0, 6, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    }

    #[test]
    fn the_last_cache_is_shared_by_all() {
        assert_eq!(leaf(0, 4, 0x8000_001d, 0).eax >> 14, 3);
    }

    #[test]
    fn the_timer_is_told_deadlines() {
        assert_eq!(leaf(0, 1, 0x1, 0).ecx & TSC_DEADLINE, TSC_DEADLINE);
    }
}
