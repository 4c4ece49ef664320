//! Where things are in the guest's physical address space, its ports and its interrupts.
//!
//! ```text
//!        0  RAM: what the kernel is started with
//!   640 KiB hole
//!   896 KiB ACPI tables
//!     1 MiB RAM: kernel, initrd at the end
//!     3 GiB hole: virtio devices, interrupt controllers
//!     4 GiB RAM: the rest
//!           persistent memory
//! ```

use std::ops::Range;

/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// What a PVH kernel is started with.
pub const PVH_START_INFO: u64 = 0x6000;
/// The only module of a PVH start, the initrd.
pub const PVH_MODULES: u64 = 0x6100;
/// The memory map of a PVH start.
pub const PVH_MEMORY_MAP: u64 = 0x6200;
/// Linux' boot parameters, Documentation/arch/x86/zero-page.rst.
pub const ZERO_PAGE: u64 = 0x7000;
/// Three page tables: the first GiB, mapped as it is.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The end of the memory below the old hole.
pub const LOWEST_RAM_END: u64 = 0xa_0000;
/// ACPI tables, the RSDP first, where a kernel without boot parameters looks for it.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// The memory that kernels expect to be loaded to.
pub const KERNEL_RAM: u64 = 0x10_0000;
/// The end of the memory below the hole for devices.
pub const LOW_RAM_END: u64 = 3 << 30;
/// The beginning of the memory above it.
pub const HIGH_RAM: u64 = 4 << 30;

/// virtio devices' registers, one page each.
pub const VIRTIO: u64 = 0xd000_0000;
/// The size of a virtio device's registers.
pub const VIRTIO_REGISTERS: u64 = 0x1000;
/// The I/O interrupt controller (KVM's).
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local interrupt controllers (KVM's).
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on some Intel processors.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller's command port.
pub const KEYBOARD_PORT: u16 = 0x64;
/// Power registers.
pub const POWER_PORT: u16 = 0x600;

/// The first serial port's interrupt.
pub const SERIAL_INTERRUPT: u32 = 4;
/// The power button's interrupt.
pub const BUTTON_INTERRUPT: u32 = 5;
/// virtio devices' interrupts, the last that the controller has; more devices share them.
pub const VIRTIO_INTERRUPTS: Range<u32> = 6..24;

/// The interrupt of the virtio device with this number.
pub fn virtio_interrupt(number: u32) -> u32 {
    VIRTIO_INTERRUPTS.start + number % (VIRTIO_INTERRUPTS.end - VIRTIO_INTERRUPTS.start)
}

/// The registers of the virtio device with this number.
pub fn virtio_registers(number: u32) -> Range<u64> {
    let start = VIRTIO + u64::from(number) * VIRTIO_REGISTERS;
    start..start + VIRTIO_REGISTERS
}
