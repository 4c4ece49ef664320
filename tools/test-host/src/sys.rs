//! The system calls that no library wraps: `bpf(2)`.

#![allow(unsafe_code)]

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use nix::libc;

/// Commands of `bpf(2)`, `enum bpf_cmd` in include/uapi/linux/bpf.h.
const MAP_CREATE: libc::c_int = 0;
const PROG_LOAD: libc::c_int = 5;
const RAW_TRACEPOINT_OPEN: libc::c_int = 17;
/// `BPF_PROG_TYPE_RAW_TRACEPOINT`
const RAW_TRACEPOINT: u32 = 17;
/// `BPF_MAP_TYPE_LRU_HASH`
const LRU_HASH: u32 = 9;

/// A table of at most `entries` keys of 8 bytes with values of 8 bytes. When it is full, the oldest key goes.
pub fn new_table(entries: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
    }
    bpf(MAP_CREATE, &Attributes { kind: LRU_HASH, key_size: 8, value_size: 8, max_entries: entries })
}

/// A program for tracepoints that the kernel has found harmless, of `struct bpf_insn` each in a number (little endian).
pub fn load_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
    }
    let instruction_count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let (instructions, license) = (instructions.as_ptr() as u64, c"Apache-2.0".as_ptr() as u64);
    bpf(PROG_LOAD, &Attributes { kind: RAW_TRACEPOINT, instruction_count, instructions, license, log: [0; 2] })
}

/// Has `program` run at each event of `tracepoint`, until what is returned is closed.
pub fn attach(program: &OwnedFd, tracepoint: &CStr) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        name: u64,
        program: u64,
    }
    let program = program.as_raw_fd().cast_unsigned().into();
    bpf(RAW_TRACEPOINT_OPEN, &Attributes { name: tracepoint.as_ptr() as u64, program })
}

/// One of the commands that make a descriptor. `Attributes` is the beginning of `union bpf_attr` that the command reads,
/// without padding; the kernel takes the rest for zeros.
fn bpf<Attributes>(command: libc::c_int, attributes: &Attributes) -> io::Result<OwnedFd> {
    let (address, size) = (std::ptr::from_ref(attributes), size_of::<Attributes>());
    // SAFETY: the kernel reads `size` bytes at `address`, all of which `attributes` lends it, and what their addresses stand
    // for is borrowed by this function's callers for as long as the call takes.
    let descriptor = unsafe { libc::syscall(libc::SYS_bpf, command, address, size) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: these commands return a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}
