//! x86-64: a machine without firmware, PCI and legacy devices but the serial port. The guest starts in its kernel, with
//! what firmware would tell it in memory: boot parameters and ACPI tables (hardware-reduced).

pub mod acpi;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod registers;

use caisson_vmm_launcher::{Error, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use self::kernel::Entry;

/// One local interrupt controller each; ids above 254 would need x2APIC tables.
pub const MAX_VCPUS: u32 = 254;

/// Makes the interrupt controllers. There is no timer chip: every guest has the processor's.
///
/// # Errors
/// When KVM refuses.
pub fn create_interrupt_controllers(vm: &VmFd) -> Result<()> {
    vm.set_tss_address(layout::KVM_TSS as usize)
        .and_then(|()| vm.create_irq_chip())
        .map_err(|error| Error::host("make the interrupt controllers")(error.into()))
}

/// Makes `count` vCPUs; the first starts at `entry` and the others wait until it wakes them.
///
/// # Errors
/// When KVM refuses.
pub fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u32, entry: Entry) -> Result<Vec<VcpuFd>> {
    let supported = cpuid::supported(kvm)?;
    let create = |number: u32| {
        let vcpu = vm.create_vcpu(number.into())?;
        vcpu.set_cpuid2(&cpuid::of_vcpu(&supported, number, count))?;
        if number == 0 {
            registers::set(&vcpu, entry)?;
        }
        Ok(vcpu)
    };
    (0..count)
        .map(|number| {
            create(number).map_err(|error: kvm_ioctls::Error| Error::host(format!("make vCPU {number}"))(error.into()))
        })
        .collect()
}

/// Whether the processor itself has what KVM needs to run guests (VMX or SVM). Without it KVM emulates, if it is there.
pub fn processor_runs_guests() -> bool {
    use std::arch::x86_64::__cpuid;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    const EXTENDED: u32 = 0x8000_0001;
    let has_extended = __cpuid(EXTENDED - 1).eax >= EXTENDED;
    __cpuid(1).ecx & VMX != 0 || has_extended && __cpuid(EXTENDED).ecx & SVM != 0
}
