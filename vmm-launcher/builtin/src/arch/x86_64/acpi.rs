//! ACPI tables (ACPI 6.5), hardware-reduced: a kernel that sees that does not look for timers, interrupt controllers,
//! keyboards and clocks of old.
//!
//! The DSDT names every device, so that the kernel's command line needs not.

use acpi_tables::{
    Aml,
    aml::{
        Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path, ResourceTemplate,
        Scope, ZERO,
    },
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use caisson_vmm_launcher::{Error, Result};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{
    ACPI, BUTTON_INTERRUPT, IO_APIC, LOCAL_APIC, POWER_PORT, SERIAL_INTERRUPT, SERIAL_PORT, virtio_interrupt,
    virtio_registers,
};
use crate::{
    memory::GuestMemory,
    power::{RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_S5},
    serial,
};

const OEM: [u8; 6] = *b"CAISSN";
const OEM_TABLE: [u8; 8] = *b"CAISSBLT";
const REVISION: u32 = 1;
/// `IAPC_BOOT_ARCH`: VGA not present, no RTC. The bits of legacy devices and the 8042 stay off.
const NO_VGA_NO_CLOCK: u16 = 1 << 2 | 1 << 5;
/// Where the RSDP ends, rounded up.
const TABLES: u64 = ACPI.start + 64;

/// Writes the tables of a machine with so many vCPUs and virtio devices.
///
/// # Errors
/// When they are too many for the place.
pub fn write(memory: &GuestMemory, vcpus: u32, virtio_devices: u32) -> Result<()> {
    let (mut tables, mut place) = (Vec::new(), TABLES);
    let mut put = |table: &dyn Aml| {
        let start = place;
        let before = tables.len();
        table.to_aml_bytes(&mut tables);
        tables.resize(tables.len().next_multiple_of(8), 0);
        place += (tables.len() - before) as u64;
        start
    };
    let dsdt = put(&dsdt(virtio_devices));
    let fadt = put(&fadt(dsdt).finalize());
    let madt = put(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt);
    if place > ACPI.end {
        return Err(Error::Invalid(format!("{virtio_devices} devices cannot be had: too many for the ACPI tables")));
    }
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    memory
        .write_slice(&rsdp, GuestAddress(ACPI.start))
        .and_then(|()| memory.write_slice(&tables, GuestAddress(TABLES)))
        .map_err(|error| Error::host("write the ACPI tables")(std::io::Error::other(error)))
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let register = |offset| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(POWER_PORT) + u64::from(offset))
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA_NO_CLOCK.into();
    (fadt.reset_reg, fadt.reset_value) = (register(RESET), RESET_VALUE);
    (fadt.sleep_control_reg, fadt.sleep_status_reg) = (register(SLEEP_CONTROL), register(SLEEP_STATUS));
    fadt
}

fn madt(vcpus: u32) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    for number in 0..vcpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(number, number, EnabledStatus::Enabled));
    }
    madt
}

fn dsdt(virtio_devices: u32) -> Sdt {
    let mut code = Vec::new();
    power_off_state().to_aml_bytes(&mut code);
    write_scope(&mut code, |devices| {
        power_button(devices);
        serial_port(devices);
        (0..virtio_devices).for_each(|number| virtio_device(number, devices));
    });
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt
}

/// `_S5`: what to write to the sleep control register to power off.
fn power_off_state() -> Name {
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]))
}

fn write_scope(code: &mut Vec<u8>, devices: impl FnOnce(&mut Vec<u8>)) {
    let mut inside = Vec::new();
    devices(&mut inside);
    Scope::new("_SB_".into(), vec![&Bytecode(inside)]).to_aml_bytes(code);
}

/// Code that was made already.
struct Bytecode(Vec<u8>);

impl Aml for Bytecode {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// The button, and the generic event device (ACPI 6.5 §5.6.9) whose only event is that it was pressed.
fn power_button(code: &mut Vec<u8>) {
    let interrupt = Interrupt::new(true, true, false, false, BUTTON_INTERRUPT);
    Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(code);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&Path::new("PWRB"), &0x80_u8)]),
        ],
    )
    .to_aml_bytes(code);
}

fn serial_port(code: &mut Vec<u8>) {
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 0, serial::REGISTERS as u8);
    let interrupt = Interrupt::new(true, true, false, false, SERIAL_INTERRUPT);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(code);
}

/// `LNRO0005` is what Linux' virtio_mmio driver goes by.
fn virtio_device(number: u32, code: &mut Vec<u8>) {
    let registers = virtio_registers(number);
    let size = (registers.end - registers.start) as u32;
    let registers = Memory32Fixed::new(true, registers.start as u32, size);
    let interrupt = Interrupt::new(true, true, false, true, virtio_interrupt(number));
    Device::new(
        format!("V{number:03X}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn bytes(memory: &GuestMemory, address: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        bytes(memory, address, length as usize)
    }

    #[test]
    fn a_kernel_finds_every_table_and_their_sums_are_right() {
        let memory = memory::allocate(16).unwrap();
        write(&memory, 2, 3).unwrap();
        let rsdp = bytes(&memory, ACPI.start, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let mut found: Vec<_> =
            xsdt[36..].chunks(8).map(|entry| table(&memory, u64::from_le_bytes(entry.try_into().unwrap()))).collect();
        let dsdt = u64::from_le_bytes(found[0][140..148].try_into().unwrap());
        found.push(table(&memory, dsdt));
        found.push(xsdt);
        let names: Vec<_> = found.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"DSDT", b"XSDT"]);
        for table in &found {
            assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        }
        let devices = found[2].windows(8).filter(|window| window == b"LNRO0005").count();
        assert_eq!(devices, 3);
    }

    #[test]
    fn more_devices_than_there_is_place_for_are_refused() {
        let memory = memory::allocate(16).unwrap();
        let error = write(&memory, 1, 4000).unwrap_err().to_string();
        assert!(error.starts_with("4000 devices cannot be had"), "{error}");
    }
}
