//! Puts the kernel, its initrd, its command line and what it has to know into guest memory.
//!
//! | file | entry |
//! |---|---|
//! | bzImage | 64-bit, at 0x200 of its protected-mode part, Documentation/arch/x86/boot.rst |
//! | vmlinux with a PVH note | PVH, https://xenbits.xen.org/docs/unstable/misc/pvh.html |
//! | vmlinux without | 64-bit, at its ELF entry |

use std::{fs::File, io::Seek, ops::Range, path::Path};

use caisson_protocol::vmm::VmConfig;
use caisson_vmm_launcher::{
    Error, Result,
    kernel::{self, KernelFormat},
};
use linux_loader::loader::{
    BzImage, Elf, KernelLoader, KernelLoaderResult,
    bootparam::{boot_e820_entry, boot_params, setup_header},
    elf::{
        PvhBootCapability,
        start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
    },
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile};

use super::{
    layout::{
        ACPI, COMMAND_LINE, GDT, HIGH_RAM, KERNEL_RAM, LOWEST_RAM_END, PAGE_TABLES, PVH_MEMORY_MAP, PVH_MODULES,
        PVH_START_INFO, ZERO_PAGE,
    },
    registers::{descriptor_table, page_tables},
};
use crate::memory::{self, GuestMemory};

/// Where the first vCPU starts, and in which manner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode.
    Linux64(u64),
    /// In 32-bit mode without paging.
    Pvh(u64),
}

/// `boot_params.hdr` of a kernel that has none: "HdrS", and the boot sector's magic.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without a number of its own.
const LOADER: u8 = 0xff;
/// `loadflags`: the kernel is loaded high; `xloadflags`: it has a 64-bit entry.
const LOADED_HIGH: u8 = 1;
const HAS_64_BIT_ENTRY: u16 = 1;
/// Where the 64-bit entry is in a bzImage's protected-mode part.
const BZIMAGE_ENTRY: u64 = 0x200;
/// `COMMAND_LINE_SIZE`, arch/x86/include/asm/setup.h, with the terminating zero.
const COMMAND_LINE_SIZE: u64 = 2048;
/// `E820_TYPE_RAM` and `E820_TYPE_RESERVED`; PVH has the same numbers.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// `XEN_HVM_START_MAGIC_VALUE`.
const PVH_MAGIC: u32 = 0x336e_c578;
const PAGE: u64 = 4096;

/// Loads what `vm` names; `command_line` is complete.
///
/// # Errors
/// When a file is not what it should be, or the memory is too small for it.
pub fn load(vm: &VmConfig, command_line: &str, memory: &GuestMemory) -> Result<Entry> {
    let kernel = load_kernel(vm, memory)?;
    let initrd = load_initrd(vm, &kernel, memory)?;
    let limit = COMMAND_LINE_SIZE.min(kernel.command_line_size);
    if command_line.len() as u64 >= limit {
        let length = command_line.len();
        return Err(Error::Invalid(format!("the kernel's parameters are {length} bytes long, at most {}", limit - 1)));
    }
    write_start(&kernel, initrd, command_line, memory)
        .map_err(|error| Error::host("write what the guest starts with")(std::io::Error::other(error)))?;
    Ok(kernel.entry)
}

/// A kernel in guest memory.
struct Kernel {
    entry: Entry,
    header: setup_header,
    /// The first address that it does not need to start.
    end: u64,
    command_line_size: u64,
    /// Where an initrd may end.
    initrd_limit: u64,
}

fn load_kernel(vm: &VmConfig, memory: &GuestMemory) -> Result<Kernel> {
    let path = Path::new(&vm.kernel);
    let format = kernel::format(path)?;
    let file = |source| Error::File { what: "guest kernel", path: path.to_owned(), source };
    let mut image = File::open(path).map_err(file)?;
    let loaded = match format {
        KernelFormat::BzImage => BzImage::load(memory, None, &mut image, Some(GuestAddress(KERNEL_RAM))),
        KernelFormat::Elf => Elf::load(memory, None, &mut image, Some(GuestAddress(KERNEL_RAM))),
    };
    let ram_end = memory::low_end(memory);
    let loaded = loaded.map_err(|error| {
        let size = image.seek(std::io::SeekFrom::End(0)).unwrap_or_default();
        if KERNEL_RAM + size > ram_end { too_small(vm) } else { unusable(vm, &error.to_string()) }
    })?;
    let kernel = match loaded.setup_header {
        Some(header) => of_bzimage(vm, &loaded, header)?,
        None => of_elf(&loaded),
    };
    if kernel.end > ram_end { Err(too_small(vm)) } else { Ok(kernel) }
}

fn of_bzimage(vm: &VmConfig, loaded: &KernelLoaderResult, header: setup_header) -> Result<Kernel> {
    if header.version < 0x020c || header.xloadflags & HAS_64_BIT_ENTRY == 0 {
        return Err(unusable(vm, "it has no 64-bit entry (Linux 3.8 and newer have one)"));
    }
    Ok(Kernel {
        entry: Entry::Linux64(loaded.kernel_load.0 + BZIMAGE_ENTRY),
        header,
        end: header.pref_address.max(loaded.kernel_load.0).saturating_add(header.init_size.into()),
        command_line_size: u64::from(header.cmdline_size) + 1,
        initrd_limit: u64::from(header.initrd_addr_max) + 1,
    })
}

fn of_elf(loaded: &KernelLoaderResult) -> Kernel {
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh(address.0),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Entry::Linux64(loaded.kernel_load.0)
        }
    };
    let header =
        setup_header { header: HEADER_MAGIC, boot_flag: BOOT_FLAG, loadflags: LOADED_HIGH, ..Default::default() };
    Kernel {
        entry,
        header,
        end: loaded.kernel_end,
        command_line_size: COMMAND_LINE_SIZE,
        // The page tables that Linux is started with, and its own first ones, reach at least as far.
        initrd_limit: 1 << 31,
    }
}

/// As far up as can be, so that the kernel has room to unpack.
fn load_initrd(vm: &VmConfig, kernel: &Kernel, memory: &GuestMemory) -> Result<Range<u64>> {
    if vm.initrd.is_empty() {
        return Ok(0..0);
    }
    let file = |source| Error::File { what: "initrd", path: (&vm.initrd).into(), source };
    let mut initrd = File::open(&vm.initrd).map_err(file)?;
    let size = initrd.metadata().map_err(file)?.len();
    if size == 0 {
        return Err(Error::Invalid(format!("the initrd {} is empty", vm.initrd)));
    }
    let end = memory::low_end(memory).min(kernel.initrd_limit);
    let start = end.checked_sub(size).map(|start| start & !(PAGE - 1)).filter(|start| *start >= kernel.end);
    let start = start.ok_or_else(|| {
        Error::Invalid(format!(
            "{} MiB of memory are too small for the initrd {} of {} MiB beside the kernel {}",
            vm.memory_mib,
            vm.initrd,
            size.div_ceil(1 << 20),
            vm.kernel
        ))
    })?;
    let into = memory.get_slice(GuestAddress(start), size as usize);
    let mut into = into.map_err(|error| file(std::io::Error::other(error)))?;
    initrd.read_exact_volatile(&mut into).map_err(|error| file(std::io::Error::other(error)))?;
    Ok(start..start + size)
}

fn write_start(
    kernel: &Kernel,
    initrd: Range<u64>,
    command_line: &str,
    memory: &GuestMemory,
) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_obj(0u8, GuestAddress(COMMAND_LINE + command_line.len() as u64))?;
    memory.write_obj(descriptor_table(kernel.entry), GuestAddress(GDT))?;
    match kernel.entry {
        Entry::Linux64(_) => {
            for (table, address) in page_tables().into_iter().zip((PAGE_TABLES..).step_by(PAGE as usize)) {
                let bytes: Vec<u8> = table.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
                memory.write_slice(&bytes, GuestAddress(address))?;
            }
            memory.write_obj(zero_page(kernel, initrd, memory), GuestAddress(ZERO_PAGE))
        }
        Entry::Pvh(_) => write_pvh_start(initrd, memory),
    }
}

fn zero_page(kernel: &Kernel, initrd: Range<u64>, memory: &GuestMemory) -> boot_params {
    let mut page = boot_params { hdr: kernel.header, acpi_rsdp_addr: ACPI.start, ..Default::default() };
    page.hdr.type_of_loader = LOADER;
    page.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    page.hdr.ramdisk_image = initrd.start as u32;
    page.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    let map = memory_map(memory);
    page.e820_entries = map.len() as u8;
    for (entry, (addr, size, kind)) in page.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type: kind };
    }
    page
}

fn write_pvh_start(initrd: Range<u64>, memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    let map = memory_map(memory);
    let start = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: u32::from(!initrd.is_empty()),
        modlist_paddr: PVH_MODULES,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI.start,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.end - initrd.start, ..Default::default() };
    memory.write_obj(start, GuestAddress(PVH_START_INFO))?;
    memory.write_obj(module, GuestAddress(PVH_MODULES))?;
    for ((addr, size, type_), place) in map.into_iter().zip(0..) {
        let entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
        memory.write_obj(entry, GuestAddress(PVH_MEMORY_MAP + place * size_of_val(&entry) as u64))?;
    }
    Ok(())
}

/// Address, size and type.
fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOWEST_RAM_END, RAM),
        (ACPI.start, ACPI.end - ACPI.start, RESERVED),
        (KERNEL_RAM, memory::low_end(memory) - KERNEL_RAM, RAM),
    ];
    map.extend(memory.iter().skip(1).map(|region| (region.start_addr().0, region.len(), RAM)));
    debug_assert!(map.get(3).is_none_or(|(address, _, _)| *address == HIGH_RAM));
    map
}

fn too_small(vm: &VmConfig) -> Error {
    Error::Invalid(format!("{} MiB of memory are too small for the guest kernel {}", vm.memory_mib, vm.kernel))
}

fn unusable(vm: &VmConfig, why: &str) -> Error {
    Error::Invalid(format!("the guest kernel {} cannot be loaded: {why}", vm.kernel))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// The smallest bzImage that a loader takes: a setup sector, and `payload`.
    fn bzimage(payload: &[u8], init_size: u32) -> tempfile::NamedTempFile {
        let mut image = vec![0; 1024];
        let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x202, b"HdrS");
        put(0x206, &0x020f_u16.to_le_bytes());
        put(0x211, &[LOADED_HIGH]);
        put(0x214, &(KERNEL_RAM as u32).to_le_bytes());
        put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
        put(0x236, &HAS_64_BIT_ENTRY.to_le_bytes());
        put(0x238, &2047_u32.to_le_bytes());
        put(0x258, &0x100_0000_u64.to_le_bytes());
        put(0x260, &init_size.to_le_bytes());
        image.extend_from_slice(payload);
        file(&image)
    }

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn vm(kernel: &tempfile::NamedTempFile, memory_mib: u64) -> VmConfig {
        VmConfig { kernel: kernel.path().to_str().unwrap().into(), memory_mib, ..Default::default() }
    }

    fn load_into(vm: &VmConfig, command_line: &str) -> Result<(Entry, GuestMemory)> {
        let memory = memory::allocate(vm.memory_mib)?;
        Ok((load(vm, command_line, &memory)?, memory))
    }

    fn refusal(vm: &VmConfig, command_line: &str) -> String {
        load_into(vm, command_line).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn a_bzimage_starts_at_its_64_bit_entry() {
        let (entry, memory) = load_into(&vm(&bzimage(b"payload", 0), 64), "quiet").unwrap();
        assert_eq!(entry, Entry::Linux64(0x10_0200));
        let mut loaded = [0; 7];
        memory.read_slice(&mut loaded, GuestAddress(KERNEL_RAM)).unwrap();
        assert_eq!(&loaded, b"payload");
        let mut command_line = [0; 6];
        memory.read_slice(&mut command_line, GuestAddress(COMMAND_LINE)).unwrap();
        assert_eq!(&command_line, b"quiet\0");
    }

    #[test]
    fn an_initrd_is_at_the_end_of_memory() {
        let (kernel, initrd) = (bzimage(b"payload", 0), file(&[7; 5000]));
        let vm = VmConfig { initrd: initrd.path().to_str().unwrap().into(), ..vm(&kernel, 64) };
        let (_, memory) = load_into(&vm, "").unwrap();
        let page: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let (start, size) = (page.hdr.ramdisk_image, page.hdr.ramdisk_size);
        assert_eq!((start, size), (0x3ff_e000, 5000));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(u64::from(start) + 4999)).unwrap(), 7);
    }

    #[test]
    fn memory_that_the_kernel_does_not_fit_in_is_refused() {
        let kernel = bzimage(b"payload", 100 << 20);
        let text = refusal(&vm(&kernel, 64), "");
        assert!(text.starts_with("64 MiB of memory are too small for the guest kernel /"), "{text}");
    }

    #[test]
    fn memory_that_the_initrd_does_not_fit_in_is_refused() {
        let (kernel, initrd) = (bzimage(b"payload", 30 << 20), file(&[0; 20 << 20]));
        let vm = VmConfig { initrd: initrd.path().to_str().unwrap().into(), ..vm(&kernel, 64) };
        assert!(refusal(&vm, "").contains("too small for the initrd"));
    }

    #[test]
    fn an_empty_initrd_is_refused() {
        let (kernel, initrd) = (bzimage(b"payload", 0), file(&[]));
        let vm = VmConfig { initrd: initrd.path().to_str().unwrap().into(), ..vm(&kernel, 64) };
        assert!(refusal(&vm, "").ends_with("is empty"));
    }

    #[test]
    fn parameters_that_are_too_long_are_refused() {
        let text = refusal(&vm(&bzimage(b"payload", 0), 64), &"x".repeat(2048));
        assert_eq!(text, "the kernel's parameters are 2048 bytes long, at most 2047");
    }

    #[test]
    fn an_elf_file_that_is_cut_off_is_refused() {
        let text = refusal(&vm(&file(b"\x7fELF and more"), 64), "");
        assert!(text.contains("cannot be loaded: "), "{text}");
    }

    #[test]
    fn the_memory_map_leaves_the_hole_out() {
        let memory = memory::allocate(4096).unwrap();
        let map = memory_map(&memory);
        assert_eq!(map[2], (KERNEL_RAM, (3 << 30) - KERNEL_RAM, RAM));
        assert_eq!(map[3], (HIGH_RAM, 1 << 30, RAM));
    }
}
