//! The state in which the first vCPU enters the kernel.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Error, VcpuFd};

use super::{
    kernel::Entry,
    layout::{PAGE_TABLES, PVH_START_INFO, ZERO_PAGE},
};

/// Control register bits, AMD64 manual volume 2 §3.1.
const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// `Reserved, always 1` of RFLAGS.
const FLAGS: u64 = 2;

/// `IA32_MISC_ENABLE`: fast strings.
const MISC_ENABLE: kvm_msr_entry = kvm_msr_entry { index: 0x1a0, reserved: 0, data: 1 };
/// `IA32_MTRR_DEF_TYPE`: enabled, and memory without a range of its own is write-back.
const MEMORY_TYPE: kvm_msr_entry = kvm_msr_entry { index: 0x2ff, reserved: 0, data: 1 << 11 | 6 };

/// Selectors that Linux expects, Documentation/arch/x86/boot.rst §"64-bit Boot Protocol".
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// The descriptors of the selectors above, for [`super::layout::GDT`].
pub fn descriptor_table(entry: Entry) -> [u64; 5] {
    let [code, data, task] = segments(entry);
    [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)]
}

/// Three page tables that map the first GiB as it is, in 2 MiB pages, for [`PAGE_TABLES`].
pub fn page_tables() -> [[u64; 512]; 3] {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let mut tables = [[0; 512]; 3];
    tables[0][0] = (PAGE_TABLES + 0x1000) | PRESENT_WRITABLE;
    tables[1][0] = (PAGE_TABLES + 0x2000) | PRESENT_WRITABLE;
    for (entry, page) in tables[2].iter_mut().zip(0..) {
        *entry = page << 21 | LARGE | PRESENT_WRITABLE;
    }
    tables
}

/// Prepares the first vCPU.
pub(super) fn set(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let mut system = vcpu.get_sregs()?;
    set_mode(&mut system, entry);
    vcpu.set_sregs(&system)?;
    vcpu.set_regs(&match entry {
        Entry::Linux64(rip) => kvm_regs { rip, rflags: FLAGS, rsi: ZERO_PAGE, ..Default::default() },
        Entry::Pvh(rip) => kvm_regs { rip, rflags: FLAGS, rbx: PVH_START_INFO, ..Default::default() },
    })?;
    let registers = Msrs::from_entries(&[MISC_ENABLE, MEMORY_TYPE]).expect("two entries fit");
    vcpu.set_msrs(&registers).map(drop)
}

fn set_mode(system: &mut kvm_sregs, entry: Entry) {
    let [code, data, task] = segments(entry);
    system.cs = code;
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.tr = task;
    (system.gdt.base, system.gdt.limit) = (super::layout::GDT, size_of_val(&descriptor_table(entry)) as u16 - 1);
    (system.idt.base, system.idt.limit) = (0, 0);
    system.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    if let Entry::Linux64(_) = entry {
        system.cr0 |= CR0_PAGING;
        system.cr3 = PAGE_TABLES;
        system.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
        system.efer = EFER_LONG_MODE;
    }
}

/// Code, data and task: flat, and 64 bits wide for Linux' entry, 32 for PVH's.
fn segments(entry: Entry) -> [kvm_segment; 3] {
    let long = matches!(entry, Entry::Linux64(_));
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    // Types: execute and read, accessed; read and write, accessed; busy task.
    let code = kvm_segment { selector: CODE, type_: 11, l: long.into(), db: (!long).into(), ..flat };
    let data = kvm_segment { selector: DATA, type_: 3, db: 1, ..flat };
    let task = kvm_segment { selector: TASK, type_: 11, s: 0, g: 0, limit: 0x67, ..flat };
    [code, data, task]
}

/// As the processor has it in memory, AMD64 manual volume 2 §4.7.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.avl) << 12
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | flags << 40
        | (limit >> 16 & 0xf) << 48
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_64_bit_descriptors_are_those_that_linux_uses() {
        // GDT_ENTRY(0xa09b, …), (0xc093, …), arch/x86/boot/compressed: the accessed bits are set already.
        let table = descriptor_table(Entry::Linux64(0));
        assert_eq!(table[2], 0x00af_9b00_0000_ffff);
        assert_eq!(table[3], 0x00cf_9300_0000_ffff);
        assert_eq!(table[4], 0x0000_8b00_0000_0067);
    }

    #[test]
    fn the_32_bit_code_descriptor_is_flat() {
        assert_eq!(descriptor_table(Entry::Pvh(0))[2], 0x00cf_9b00_0000_ffff);
    }

    #[test]
    fn the_page_tables_map_the_first_gib() {
        let tables = page_tables();
        assert_eq!(tables[0][0], 0xa003);
        assert_eq!(tables[1][0], 0xb003);
        assert_eq!(tables[2][511], 0x3fe0_0083);
    }
}
