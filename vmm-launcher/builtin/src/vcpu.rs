//! The vCPUs: one thread each.
//!
//! ```text
//!             run                 the guest ends the VM, KVM fails
//!  standing ──────► running ─────────────────────────────────────► ended
//!     ▲  │ stand       │ kicked                                       ▲
//!     │  └─────────────┘                                              │
//!     └──── end ──────────────────────────────────────────────────────┘
//! ```
//!
//! What is wanted is written down first, and then every thread is kicked out of the guest to read it.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU8, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use caisson_vmm_launcher::{Error, Result};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tokio::{sync::watch, time::timeout};
use tracing::debug;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::{
    bus::Bus,
    ending::{End, Ending},
    event_loop::STACK_BYTES,
};

/// A vCPU leaves the guest in microseconds, or finishes what a device does for it first.
const STAND_DEADLINE: Duration = Duration::from_secs(10);

/// What the guest reaches by leaving to its VMM.
#[derive(Default)]
pub struct Buses {
    /// `in` and `out` instructions.
    pub ports: Bus,
    /// Addresses without memory.
    pub memory: Bus,
}

/// All vCPUs of a VM; they end, and are waited for, when this is dropped.
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<Thread>,
}

struct Thread {
    kick: Kick,
    /// Gives the vCPU back: its shared page stays mapped for as long as it can be kicked.
    handle: JoinHandle<VcpuFd>,
}

/// Where the threads read what is wanted of them.
struct Gate {
    wanted: Mutex<Wanted>,
    changed: Condvar,
    /// How many threads are not in the guest.
    standing: watch::Sender<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Stand,
    Run,
    End,
}

impl Vcpus {
    /// Has this process ready for the signal that makes vCPUs leave the guest.
    ///
    /// # Errors
    /// When the host refuses its handler.
    pub fn catch_kicks() -> Result<()> {
        extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), leave_guest)
            .map_err(|error| Error::host("set the vCPUs' signal handler")(error.into()))
    }

    /// Starts a thread for each of `vcpus`, standing before its first instruction. To be called after [`Self::catch_kicks`].
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(vcpus: Vec<VcpuFd>, buses: Arc<Buses>, ending: &Ending) -> Result<Self> {
        let wanted = Mutex::new(Wanted::Stand);
        let gate = Arc::new(Gate { wanted, changed: Condvar::new(), standing: watch::Sender::new(vcpus.len()) });
        // Dropped when a later thread cannot be started.
        let mut started = Self { gate: gate.clone(), threads: Vec::with_capacity(vcpus.len()) };
        for (number, mut vcpu) in vcpus.into_iter().enumerate() {
            let kick = Kick::of(&mut vcpu);
            let vcpu =
                Vcpu { number, vcpu, gate: gate.clone(), buses: buses.clone(), ending: ending.clone(), booted: false };
            let thread = std::thread::Builder::new().name(format!("vcpu{number}")).stack_size(STACK_BYTES);
            let handle =
                thread.spawn(move || vcpu.live()).map_err(Error::host(format!("start vCPU {number}'s thread")))?;
            started.threads.push(Thread { kick, handle });
        }
        Ok(started)
    }

    /// Lets them run.
    pub fn run(&self) {
        self.want(Wanted::Run);
    }

    /// Has them stand. The answer is a future that is done when they do; it does not borrow the vCPUs.
    pub fn stand(&self) -> impl Future<Output = Result<()>> + use<> {
        self.want(Wanted::Stand);
        let (mut standing, all) = (self.gate.standing.subscribe(), self.threads.len());
        async move {
            let stand = timeout(STAND_DEADLINE, standing.wait_for(|standing| *standing == all)).await;
            let seconds = STAND_DEADLINE.as_secs();
            stand
                .map(drop)
                .map_err(|_| Error::Hypervisor(format!("the vCPUs did not leave the guest within {seconds} s")))
        }
    }

    /// Has them end without waiting for it.
    pub fn abandon(&self) {
        self.want(Wanted::End);
    }

    fn want(&self, wanted: Wanted) {
        *self.gate.wanted() = wanted;
        self.gate.changed.notify_all();
        for thread in &self.threads {
            thread.kick.leave_guest(&thread.handle);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.want(Wanted::End);
        for thread in self.threads.drain(..) {
            let _ = thread.handle.join();
        }
    }
}

impl Gate {
    /// Waits until there is something else to do than to stand.
    fn wait(&self) -> Wanted {
        let wanted = self.changed.wait_while(self.wanted(), |wanted| *wanted == Wanted::Stand);
        *wanted.expect("nobody panics with it")
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().expect("nobody panics with it")
    }
}

/// `kvm_run.immediate_exit` of one vCPU, Documentation/virt/kvm/api.rst §5.
struct Kick(*const AtomicU8);

// SAFETY: the pointer is to a page that the kernel and several threads share, and is only used as an atomic.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    fn of(vcpu: &mut VcpuFd) -> Self {
        Self((&raw mut vcpu.get_kvm_run().immediate_exit).cast())
    }

    /// Has the thread come out of the guest: at once by a signal, or the next time that it wants to go in.
    fn leave_guest(&self, thread: &JoinHandle<VcpuFd>) {
        // SAFETY: `thread` is not joined, so that its `VcpuFd`, which has the page mapped, lives; everybody uses this byte
        // as an atomic while the thread runs.
        unsafe { &*self.0 }.store(1, Ordering::SeqCst);
        // It fails when the thread has ended, which is as good.
        let _ = thread.kill(SIGRTMIN());
    }

    fn forget(&self) {
        // SAFETY: called by the thread that owns the `VcpuFd`, while it does.
        unsafe { &*self.0 }.store(0, Ordering::SeqCst);
    }
}

/// One vCPU, on its thread.
struct Vcpu {
    number: usize,
    vcpu: VcpuFd,
    gate: Arc<Gate>,
    buses: Arc<Buses>,
    ending: Ending,
    booted: bool,
}

impl Vcpu {
    fn live(mut self) -> VcpuFd {
        while self.gate.wait() == Wanted::Run && !self.ending.is_told() {
            self.gate.standing.send_modify(|standing| *standing -= 1);
            if let Some(end) = self.run_guest() {
                debug!(vcpu = self.number, ?end, "the guest ends");
                self.ending.tell(end);
            }
            self.gate.standing.send_modify(|standing| *standing += 1);
        }
        self.vcpu
    }

    /// Runs the guest until somebody kicks or the VM ends.
    fn run_guest(&mut self) -> Option<End> {
        if std::mem::replace(&mut self.booted, true) {
            // The guest would take the pause for a hang. Not every guest has the clock that this is about.
            let _ = self.vcpu.kvmclock_ctrl();
        }
        let kick = Kick::of(&mut self.vcpu);
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    self.buses.ports.write(port.into(), data);
                    if self.ending.is_told() {
                        return None;
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => self.buses.ports.read(port.into(), data),
                Ok(VcpuExit::MmioRead(address, data)) => self.buses.memory.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.buses.memory.write(address, data),
                // A triple fault: what is left to a guest that cannot reset in any other way.
                Ok(VcpuExit::Shutdown) => return Some(End::Reset),
                Ok(VcpuExit::Intr) => return None,
                Err(error) if error.errno() == libc::EINTR => {
                    kick.forget();
                    if *self.gate.wanted() != Wanted::Run {
                        return None;
                    }
                }
                Err(error) if error.errno() == libc::EAGAIN => {}
                Ok(VcpuExit::InternalError) => return Some(self.failed("KVM met an internal error")),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    let why = format!("the processor does not enter the guest (reason {reason:#x})");
                    return Some(self.failed(&why));
                }
                Ok(other) => {
                    let why = format!("KVM left the guest for an unknown reason ({other:?})");
                    return Some(self.failed(&why));
                }
                Err(error) => return Some(self.failed(&format!("KVM does not run it: {error}"))),
            }
        }
    }

    fn failed(&self, why: &str) -> End {
        let place = self.vcpu.get_regs().map(|registers| format!(" at instruction {:#x}", registers.rip));
        End::Failed(format!("vCPU {} cannot go on{}: {why}", self.number, place.unwrap_or_default()))
    }
}
