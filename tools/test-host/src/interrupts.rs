//! Sees to it that guests get each interrupt once.
//!
//! When KVM injects an interrupt, QEMU delivers it (`helper_vmrun` in target/i386/tcg/sysemu/svm_helper.c) and leaves its
//! number where an exception's would be. If QEMU then stops executing instructions for a moment before the guest has left
//! to KVM, because a timer is due or another thread of it wants something, it takes that number for an exception and delivers
//! the interrupt a second time, whatever the guest's interrupt flag says. A guest that was about to handle it then waits for a
//! lock of its own for ever.
//!
//! So each guest leaves at once when an interrupt has been injected, before its first instruction, by an interrupt that the
//! processor sends itself:
//!
//! ```text
//! KVM, interrupts on    kvm_inj_virq   the thread is noted
//! KVM, interrupts off   kvm_entry      was it noted? Then a signal 0, for which the kernel needs interrupts: it asks for one
//!     VMRUN                            QEMU delivers the guest's interrupt, finds the processor's own: the guest leaves
//! KVM, interrupts on                   the kernel sends signal 0, which is none
//! KVM, interrupts off   kvm_entry      was not noted: the guest goes on
//! ```

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};

use crate::sys;

/// More threads than ever run guests at a time.
const THREADS: u32 = 1024;

/// Functions for programs, include/uapi/linux/bpf.h.
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_DELETE_ELEM: i32 = 3;
const GET_CURRENT_PID_TGID: i32 = 14;
const SEND_SIGNAL: i32 = 109;

/// Registers: of results, of the first four arguments, and of the frame.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const FRAME: u8 = 10;
/// Where in the frame the thread's id is.
const THREAD: i16 = -8;

/// Guests get each interrupt once for as long as this is kept.
#[derive(Debug)]
pub struct DeliveredOnce {
    _attached: [OwnedFd; 2],
}

impl DeliveredOnce {
    /// KVM's modules must have been loaded.
    pub fn new() -> Result<Self> {
        let noted = sys::new_table(THREADS).context("make a table for BPF")?;
        let attached = [
            attach(&note_thread(&noted), c"kvm_inj_virq").context("watch KVM's injections of interrupts")?,
            attach(&leave_if_noted(&noted), c"kvm_entry").context("watch KVM's entries to guests")?,
        ];
        Ok(Self { _attached: attached })
    }
}

fn attach(program: &[u64], tracepoint: &std::ffi::CStr) -> Result<OwnedFd> {
    let program = sys::load_program(program).context("load a BPF program")?;
    sys::attach(&program, tracepoint).with_context(|| format!("attach it to {}", tracepoint.to_string_lossy()))
}

fn note_thread(noted: &OwnedFd) -> Vec<u64> {
    let mut program = find_thread(noted).to_vec();
    program.extend([copy(R3, R2), set(R4, 0), call(MAP_UPDATE_ELEM), set(R0, 0), exit()]);
    program
}

fn leave_if_noted(noted: &OwnedFd) -> Vec<u64> {
    let mut program = find_thread(noted).to_vec();
    let signal = [set(R1, 0), call(SEND_SIGNAL)];
    program.extend([call(MAP_DELETE_ELEM), skip_unless_zero(R0, signal.len())]);
    program.extend(signal);
    program.extend([set(R0, 0), exit()]);
    program
}

/// The table in the register of the first argument, and the key's address in that of the second.
fn find_thread(noted: &OwnedFd) -> [u64; 6] {
    let [table, table_end] = load_table(R1, noted);
    [call(GET_CURRENT_PID_TGID), store(FRAME, THREAD, R0), table, table_end, copy(R2, FRAME), add(R2, THREAD.into())]
}

fn load_table(to: u8, table: &OwnedFd) -> [u64; 2] {
    const IT_IS_A_TABLE: u8 = 1;
    [instruction(0x18, to, IT_IS_A_TABLE, 0, table.as_raw_fd()), 0]
}

fn store(base: u8, offset: i16, from: u8) -> u64 {
    instruction(0x7b, base, from, offset, 0)
}

fn copy(to: u8, from: u8) -> u64 {
    instruction(0xbf, to, from, 0, 0)
}

fn set(to: u8, value: i32) -> u64 {
    instruction(0xb7, to, 0, 0, value)
}

fn add(to: u8, value: i32) -> u64 {
    instruction(0x07, to, 0, 0, value)
}

fn call(function: i32) -> u64 {
    instruction(0x85, 0, 0, 0, function)
}

fn skip_unless_zero(register: u8, instructions: usize) -> u64 {
    instruction(0x55, register, 0, instructions as i16, 0)
}

fn exit() -> u64 {
    instruction(0x95, 0, 0, 0, 0)
}

/// `struct bpf_insn`: the operation's code, the destination and the source in four bits each, an offset, a constant.
fn instruction(code: u8, destination: u8, source: u8, offset: i16, constant: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = constant.to_le_bytes();
    u64::from_le_bytes([code, source << 4 | destination, low, high, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel's Documentation/bpf/instruction-set.rst lays them out.
    #[test]
    fn instructions_are_laid_out_as_the_kernel_reads_them() {
        assert_eq!(store(FRAME, THREAD, R0).to_le_bytes(), [0x7b, 0x0a, 0xf8, 0xff, 0, 0, 0, 0]);
        assert_eq!(copy(R2, FRAME).to_le_bytes(), [0xbf, 0xa2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(call(SEND_SIGNAL).to_le_bytes(), [0x85, 0, 0, 0, 109, 0, 0, 0]);
    }
}
