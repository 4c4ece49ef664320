//! Whether KVM really runs guests here. `/dev/kvm` may exist and still not: a KVM without processor support emulates the
//! guest instruction by instruction and gives up at the first that it does not know.

use std::{
    sync::mpsc::{RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::sys;

/// A guest of a few instructions takes some microseconds; on a busy host, itself emulated, it was seen to take seconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long after the deadline an interrupted vCPU may take to come back.
const GIVE_UP: Duration = Duration::from_millis(10);
const CODE: u64 = 0x1000;
/// In real mode. No emulator of KVM's (`arch/x86/kvm/emulate.c`) knows `popcnt` or `fsqrt`.
const PROGRAM: &[u8] = &[
    0xdb, 0xe3, // fninit
    0xd9, 0xe8, // fld1
    0xd9, 0xfa, // fsqrt
    0xf3, 0x0f, 0xb8, 0xc3, // popcnt ax, bx
    0xf4, // hlt
];
const INPUT: u64 = 0xf0f0;
const OUTPUT: u64 = 8;

/// For a hypervisor that cannot do without.
///
/// # Errors
/// When KVM runs no guests here, and why.
pub async fn require(hypervisor: &str) -> crate::Result<()> {
    let why = match probe_aside().await {
        Ok(()) => return Ok(()),
        Err(why) => why,
    };
    Err(crate::Error::Invalid(format!("{hypervisor} needs KVM, which cannot be used on this machine: {why}")))
}

/// [`probe`] on a thread of its own: it takes some milliseconds, and longer where KVM is broken.
///
/// # Errors
/// As [`probe`].
pub async fn probe_aside() -> Result<(), String> {
    tokio::task::spawn_blocking(probe).await.unwrap_or_else(|_| Err("the probe of /dev/kvm failed".into()))
}

/// Runs a guest of five instructions.
///
/// # Errors
/// Why KVM cannot be used, in one sentence.
pub fn probe() -> Result<(), String> {
    let (tell, told) = channel();
    extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), interrupt)
        .map_err(|error| format!("a signal handler cannot be set: {error}"))?;
    let started = Instant::now();
    let guest = std::thread::spawn(move || tell.send(run_guest()));
    let mut patience = DEADLINE;
    loop {
        match told.recv_timeout(patience) {
            Ok(verdict) => return verdict,
            Err(RecvTimeoutError::Disconnected) => return Err("the probe ended without an answer".into()),
            Err(RecvTimeoutError::Timeout) if started.elapsed() > 3 * DEADLINE => {
                return Err("/dev/kvm does not come back from a guest of five instructions".into());
            }
            Err(RecvTimeoutError::Timeout) => {
                // Makes KVM_RUN end with EINTR; again, in case it had not begun.
                let _ = guest.kill(SIGRTMIN());
                patience = GIVE_UP;
            }
        }
    }
}

fn run_guest() -> Result<(), String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(format!("/dev/kvm speaks version {} and not {KVM_API_VERSION}", kvm.get_api_version()));
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)])
        .map_err(|error| format!("no memory for a guest: {error}"))?;
    memory.write_slice(PROGRAM, GuestAddress(CODE)).map_err(|error| format!("no memory for a guest: {error}"))?;
    let vm = kvm.create_vm().map_err(|error| format!("/dev/kvm makes no VM: {error}"))?;
    let mut vcpu = make_vcpu(&vm, &memory).map_err(|error| format!("/dev/kvm makes no vCPU: {error}"))?;
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => {}
        Ok(VcpuExit::InternalError) => {
            return Err("/dev/kvm only emulates guests: it gave up at an ordinary instruction".into());
        }
        Ok(other) => return Err(format!("/dev/kvm does not run ordinary instructions: {other:?}")),
        Err(error) if error.errno() == libc::EINTR => {
            return Err("/dev/kvm takes too long for a guest of five instructions".into());
        }
        Err(error) => return Err(format!("/dev/kvm does not run a guest: {error}")),
    }
    let output = vcpu.get_regs().map_err(|error| format!("/dev/kvm does not tell registers: {error}"))?.rax;
    if output == OUTPUT { Ok(()) } else { Err(format!("/dev/kvm computes wrongly: popcnt of {INPUT:#x} was {output}")) }
}

fn make_vcpu(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<VcpuFd, kvm_ioctls::Error> {
    sys::map_guest_memory(vm, memory)?;
    let vcpu = vm.create_vcpu(0)?;
    let mut segments = vcpu.get_sregs()?;
    (segments.cs.base, segments.cs.selector) = (0, 0);
    vcpu.set_sregs(&segments)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rflags, registers.rax, registers.rbx) = (CODE, 2, 0, INPUT);
    vcpu.set_regs(&registers)?;
    Ok(vcpu)
}
