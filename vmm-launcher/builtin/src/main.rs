//! `caisson-vmm-builtin`: the launcher that is its own hypervisor.

use std::process::ExitCode;

fn main() -> ExitCode {
    caisson_vmm_builtin::seccomp::keep_one_heap();
    caisson_vmm_launcher::cli::main::<caisson_vmm_builtin::hypervisor::Builtin>()
}
