//! What the VMM's threads may ask the kernel for once the VM is built: a seccomp filter (`seccomp(2)`) for those that carry
//! out what the guest wants, and a wider one for the thread that serves the contract. Neither lets a program be executed,
//! memory be made executable, or a socket be made that reaches further than this machine.
//!
//! A thread that asks for something else stands still from then on; [`Violations`] tells which, and the VM ends.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::IntoRawFd,
    sync::atomic::{AtomicI32, AtomicI64, Ordering},
};

use caisson_vmm_launcher::{Error, Result};
use libc::{AF_UNIX, PR_SET_NAME, PR_SET_VMA, PROT_EXEC, SIGSYS, c_int, c_long, c_void, siginfo_t};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};
use tokio::net::unix::pipe;
use vmm_sys_util::signal::register_signal_handler;

/// For all threads: memory, threads, time, and what is done with descriptors that are open already.
const BASE: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_io_uring_enter,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    // Where a thread stands that has violated its filter.
    libc::SYS_pause,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Beside [`BASE`], for a VM whose shared directories this process serves itself.
const FILES: &[c_long] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_copy_file_range,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_name_to_handle_at,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_open_by_handle_at,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setxattr,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    // Its threads have a file mode mask of their own.
    libc::SYS_unshare,
    libc::SYS_utimensat,
];

/// Beside [`BASE`], for the thread that serves the contract: connections, logs and processes, and `ioctl` of any kind.
const SERVE: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_ioctl,
    libc::SYS_kill,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_pipe2,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_rt_sigaction,
    libc::SYS_socketpair,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_timerfd_create,
    libc::SYS_uname,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_wait4,
    libc::SYS_waitid,
];

/// `KVM_RUN`, `KVM_GET_REGS`, `KVM_KVMCLOCK_CTRL` (linux/kvm.h), `TUNSETOFFLOAD`, `TUNSETQUEUE` (linux/if_tun.h), `FIONBIO`.
const IOCTLS: [u64; 6] = [0xae80, 0x8090_ae81, 0xaead, 0x4004_54d0, 0x4004_54d9, 0x5421];

/// Who is filtered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Carries out what the guest wants. The threads that it starts are filtered likewise.
    Device {
        /// Whether it serves shared directories too.
        serves_files: bool,
    },
    /// Serves the contract.
    Contract,
}

/// A filter, ready for threads to submit to.
#[derive(Clone, Debug)]
pub struct Filter(BpfProgram);

impl Filter {
    /// The filter for `thread`.
    ///
    /// # Errors
    /// When the kernel has no such filters.
    pub fn of(thread: Thread) -> Result<Self> {
        if !is_there() {
            let why = "this machine's kernel has no seccomp filters; seccomp = false runs a VM without";
            return Err(Error::Unsupported(why.into()));
        }
        compile(thread).map(Self).map_err(|error| Error::host("make a seccomp filter")(io::Error::other(error)))
    }

    /// Filters the calling thread, and all that it starts, for ever.
    pub fn submit(&self) {
        apply_filter(&self.0).expect("the kernel takes filters, and this one is valid");
    }
}

/// Has all threads take their memory from one heap, which glibc grows and shrinks with `brk(2)` alone. Threads would have heaps
/// of their own otherwise, and the first time that one gets smaller, glibc opens a file (`check_may_shrink_heap` in its
/// sysdeps/unix/sysv/linux/malloc-sysdep.h), which a filtered thread must not. To be called before there are other threads.
pub fn keep_one_heap() {
    // SAFETY: it sets a number; the only other thing that it does is to initialise the allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Whether the kernel can do what [`compile`] asks of it.
fn is_there() -> bool {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the kernel reads four bytes, seccomp(2), which are valid for the whole call.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    answer == 0
}

fn compile(thread: Thread) -> Result<BpfProgram, seccompiler::Error> {
    let more = match thread {
        Thread::Device { serves_files: true } => FILES,
        Thread::Device { serves_files: false } => &[],
        Thread::Contract => SERVE,
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    rules.insert(libc::SYS_socket, vec![rule(0, SeccompCmpOp::Eq, AF_UNIX as u64)?]);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![rule(2, SeccompCmpOp::MaskedEq(PROT_EXEC as u64), 0)?]);
    }
    let names = [PR_SET_NAME, PR_SET_VMA].map(|option| rule(0, SeccompCmpOp::Eq, option as u64));
    rules.insert(libc::SYS_prctl, names.into_iter().collect::<Result<_, _>>()?);
    let ioctls = IOCTLS.map(|request| rule(1, SeccompCmpOp::Eq, request));
    rules.insert(libc::SYS_ioctl, ioctls.into_iter().collect::<Result<_, _>>()?);
    // No rule: whatever the arguments are.
    rules.extend(BASE.iter().chain(more).map(|call| (*call, Vec::new())));
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// For one argument, of which the kernel looks at the lower half.
fn rule(argument: u8, operation: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::Error> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operation, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// The system call that a thread was stopped at, and that thread; the first one counts.
static CALL: AtomicI64 = AtomicI64::new(NONE);
static THREAD: AtomicI32 = AtomicI32::new(0);
/// The pipe to the only [`Violations`].
static NEWS: AtomicI32 = AtomicI32::new(-1);
const NONE: i64 = -1;

/// Tells of threads that were stopped by their filter. There is one in a process.
pub struct Violations(pipe::Receiver);

impl Violations {
    /// From now on.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn watch() -> Result<Self> {
        let watch = || {
            let (news, handlers) = io::pipe()?;
            // The handler's, for as long as the process lives.
            NEWS.store(handlers.into_raw_fd(), Ordering::SeqCst);
            register_signal_handler(SIGSYS, stand_still)?;
            Ok(Self(pipe::Receiver::from_owned_fd(news.into())?))
        };
        watch().map_err(Error::host("watch for violations of the seccomp filter"))
    }

    /// Answers when a thread was stopped: which, and at what.
    pub async fn told(&self) -> String {
        // It fails only when the runtime ends, and then nobody waits.
        let _ = self.0.readable().await;
        let (call, thread) = (CALL.load(Ordering::SeqCst), THREAD.load(Ordering::SeqCst));
        let name = fs::read_to_string(format!("/proc/self/task/{thread}/comm")).unwrap_or_default();
        format!(
            "the VMM's thread {} made system call {call}, which its seccomp filter forbids \
             (seccomp = false runs a VM without the filter)",
            name.trim()
        )
    }
}

/// The handler of SIGSYS: only what `signal-safety(7)` allows.
extern "C" fn stand_still(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    /// Where `si_syscall` is in `siginfo_t`, in integers: after signal, errno, code, padding, and a pointer.
    const CALL_NUMBER: usize = 6;
    // SAFETY: the kernel hands a valid `siginfo_t` to a handler that was registered with SA_SIGINFO; it is larger than this.
    let call = unsafe { *info.cast::<c_int>().add(CALL_NUMBER) };
    // SAFETY: it has no arguments and always succeeds.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) } as c_int;
    if CALL.compare_exchange(NONE, call.into(), Ordering::SeqCst, Ordering::SeqCst).is_ok() {
        THREAD.store(thread, Ordering::SeqCst);
    }
    // SAFETY: as above.
    if thread == unsafe { libc::getpid() } {
        // Nobody is left to tell of it.
        const WORDS: &[u8] =
            b"a seccomp filter has ended the VMM: its first thread made a system call that it must not\n";
        // SAFETY: the words are valid for the whole call.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, WORDS.as_ptr().cast(), WORDS.len()) };
        // SAFETY: it ends the process without a look at its state.
        unsafe { libc::_exit(libc::EXIT_FAILURE) };
    }
    let news = 1_u8;
    // SAFETY: the byte is valid for the whole call; a descriptor that is none makes it fail.
    let _ = unsafe { libc::write(NEWS.load(Ordering::SeqCst), (&raw const news).cast(), 1) };
    loop {
        // SAFETY: it has no arguments.
        unsafe { libc::pause() };
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::channel, thread, time::Duration};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    /// On a thread of its own that carries out what the guest wants.
    fn filtered(thread: Thread, act: impl FnOnce() + Send + 'static) {
        let filter = Filter::of(thread).unwrap();
        let (tell, done) = channel();
        thread::spawn(move || {
            filter.submit();
            act();
            let _ = tell.send(());
        });
        done.recv_timeout(DEADLINE).expect("the filter allows it");
    }

    /// One test for both, because a process has one handler.
    #[tokio::test]
    async fn a_forbidden_call_stops_its_thread_and_is_told() {
        let violations = Violations::watch().unwrap();
        let filter = Filter::of(Thread::Device { serves_files: false }).unwrap();
        thread::Builder::new()
            .name("vcpu7".into())
            .spawn(move || {
                filter.submit();
                let _ = nix::unistd::getppid();
            })
            .unwrap();
        let told = tokio::time::timeout(DEADLINE, violations.told()).await.expect("it is told");
        let expected = format!("the VMM's thread vcpu7 made system call {}, which", libc::SYS_getppid);
        assert!(told.starts_with(&expected), "{told}");
    }

    #[test]
    fn a_filtered_thread_works_with_memory_threads_and_descriptors() {
        filtered(Thread::Device { serves_files: false }, || {
            let event = EventFd::new(EFD_NONBLOCK).unwrap();
            event.write(1).unwrap();
            let sum = thread::spawn(|| vec![1_u8; 8 << 20].iter().map(|byte| u64::from(*byte)).sum::<u64>());
            assert_eq!(sum.join().unwrap(), 8 << 20);
        });
    }

    #[test]
    fn a_filtered_thread_gives_memory_back() {
        keep_one_heap();
        filtered(Thread::Device { serves_files: false }, || {
            let pieces: Vec<_> = (0..64 << 10).map(|_| vec![1_u8; 1 << 10]).collect();
            drop(pieces);
        });
    }

    #[test]
    fn the_contracts_thread_works_with_files() {
        filtered(Thread::Contract, || {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), "x").unwrap();
            assert_eq!(fs::read_to_string(file.path()).unwrap(), "x");
        });
    }
}
