//! The guest kernel's command line, as far as it depends on QEMU.

use caisson_protocol::vmm::VmConfig;

/// For every guest: the console is the serial port, a panic ends the VM at once (`-no-reboot`), only a panic and what the
/// agent says is worth a slow serial port, QEMU's random numbers are trusted, and there is one serial port to look for.
const ALWAYS: &str = "console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on 8250.nr_uarts=1 cryptomgr.notests";

/// Memory that comes later is used, and only for what can be moved when it has to go again.
const ONLINE: &str = "memhp_default_state=online_movable";

/// The command line; what `vm` asks for comes last and wins. `tsc_khz` is the frequency of the time stamp counter of an
/// emulated guest, which is the host's.
pub fn kernel_params(vm: &VmConfig, tsc_khz: Option<u64>) -> String {
    let mut params = vec![ALWAYS.to_owned()];
    if let Some(khz) = tsc_khz {
        // Emulated timers tick when the host has time for them: a guest that measures its clock against them, or waits
        // for them to prove themselves, gets it wrong on a busy host or never gets on.
        params.push(format!("no_timer_check tsc=reliable tsc_early_khz={khz}"));
    }
    if vm.max_memory_mib > vm.memory_mib {
        params.push(ONLINE.into());
    }
    if !vm.image.is_empty() {
        params.push("root=/dev/vda ro".into());
    }
    if !vm.kernel_params.is_empty() {
        params.push(vm.kernel_params.clone());
    }
    params.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_comes_last() {
        let vm = VmConfig { kernel_params: "console=hvc0".into(), ..Default::default() };
        assert_eq!(kernel_params(&vm, None), format!("{ALWAYS} console=hvc0"));
    }

    #[test]
    fn an_emulated_guest_is_told_its_clock() {
        let params = kernel_params(&VmConfig::default(), Some(2_596_128));
        assert!(params.ends_with("tsc_early_khz=2596128"), "{params}");
    }

    #[test]
    fn an_image_is_the_root_disk() {
        let vm = VmConfig { image: "/image".into(), ..Default::default() };
        assert!(kernel_params(&vm, None).ends_with("root=/dev/vda ro"));
    }
}
