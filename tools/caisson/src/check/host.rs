//! Can this machine run virtual machines?

use std::{
    fs::{self, OpenOptions},
    path::Path,
};

use caisson_config_service::resolve::Resolved;

use super::Finding;
use crate::{host, launcher::Capabilities};

/// What the configuration in force asks of the machine beyond the ordinary.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    huge_pages: bool,
    confidential: bool,
    vfio: bool,
    /// Whether the hypervisor in force also runs without KVM.
    emulates: bool,
}

impl Wanted {
    fn of(resolved: Option<&Resolved>, told: Option<&Capabilities>) -> Self {
        let settings = || resolved.into_iter().flat_map(|resolved| &resolved.settings);
        let is_on = |name: &str| {
            let mut named = settings().filter(|setting| setting.key.rsplit('.').next() == Some(name));
            named.any(|setting| !matches!(setting.value.to_string().as_str(), "false" | "\"\"" | "\"no-port\"" | "0"))
        };
        Self {
            huge_pages: is_on("enable_hugepages"),
            confidential: is_on("confidential_guest"),
            vfio: is_on("cold_plug_vfio") || is_on("hot_plug_vfio"),
            emulates: told.is_some_and(|told| !told.accelerator.is_empty() && told.accelerator != "kvm"),
        }
    }
}

/// Every finding about the machine, the most important first.
pub(super) fn examine(resolved: Option<&Resolved>, told: Option<&Capabilities>) -> Vec<Finding> {
    let wanted = Wanted::of(resolved, told);
    vec![
        root(),
        cpu(&host::field(&host::read("/proc/cpuinfo"), "flags")),
        kvm(caisson_vmm_launcher::kvm::probe(), wanted.emulates),
        device("vhost vsock", "/dev/vhost-vsock", "vhost_vsock", "the launchers bring a vsock of their own"),
        device("tun", "/dev/net/tun", "tun", "pods get no network interfaces"),
        device("vhost net", "/dev/vhost-net", "vhost_net", "the guests' network is slower"),
        cgroup(),
        iommu(wanted.vfio),
        tdx(wanted.confidential),
        sev_snp(wanted.confidential),
        huge_pages(&host::read("/proc/meminfo"), wanted.huge_pages),
    ]
}

fn root() -> Finding {
    if nix::unistd::geteuid().is_root() {
        Finding::pass("user", "root")
    } else {
        Finding::warn("user", "not root, so devices may look worse than they are", "run this as root, as containerd is")
    }
}

fn cpu(flags: &str) -> Finding {
    let has = |flag| flags.split(' ').any(|word| word == flag);
    let in_guest = if has("hypervisor") { "; this machine is a virtual one itself" } else { "" };
    if cfg!(target_arch = "aarch64") {
        return Finding::pass("CPU", "aarch64, which always has virtualisation");
    }
    match (has("vmx"), has("svm")) {
        (true, _) => Finding::pass("CPU", format!("Intel VT-x (vmx){in_guest}")),
        (_, true) => Finding::pass("CPU", format!("AMD-V (svm){in_guest}")),
        (false, false) if has("hypervisor") => Finding::warn(
            "CPU",
            "neither vmx nor svm: this machine is a virtual one, and its host keeps virtualisation to itself",
            "allow nested virtualisation on its host",
        ),
        (false, false) => {
            Finding::warn("CPU", "neither vmx nor svm", "switch virtualisation on in the machine's firmware")
        }
    }
}

fn kvm(probe: Result<(), String>, emulates: bool) -> Finding {
    match probe {
        Ok(()) => Finding::pass("KVM", "ran a guest"),
        Err(why) if emulates => Finding::warn(
            "KVM",
            format!("{why}; the configured hypervisor emulates, which is slow"),
            "use a machine with hardware virtualisation for more than trying it out",
        ),
        Err(why) => Finding::fail(
            "KVM",
            why,
            "load kvm_intel or kvm_amd, or run `caisson hypervisor use qemu`, which emulates where there is no KVM",
        ),
    }
}

/// A character device that a kernel module brings.
fn device(subject: &str, path: &str, module: &str, without: &str) -> Finding {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Finding::pass(subject, path),
        Err(error) => {
            Finding::warn(subject, format!("{path}: {}; {without}", reason(&error)), format!("modprobe {module}"))
        }
    }
}

fn cgroup() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Finding::pass("cgroup", "version 2");
    }
    let remedy = "boot the host with systemd.unified_cgroup_hierarchy=1";
    Finding::warn("cgroup", "version 1: what a pod uses on the host is counted only in part", remedy)
}

fn iommu(wanted: bool) -> Finding {
    let groups = fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count);
    if groups > 0 {
        return Finding::pass("IOMMU", format!("{groups} groups"));
    }
    let remedy = "boot the host with intel_iommu=on or amd_iommu=on, and switch the IOMMU on in its firmware";
    optional(wanted, "IOMMU", "no groups: devices cannot be passed through (VFIO)", remedy)
}

fn tdx(wanted: bool) -> Finding {
    if is_on("/sys/module/kvm_intel/parameters/tdx") {
        return Finding::pass("TDX", "on");
    }
    let remedy = "only on Intel processors that have it: switch it on in the firmware, and load kvm_intel with tdx=1";
    // The other kind of confidential guest may be what is wanted.
    optional(wanted && !is_on(SEV_SNP), "TDX", "no", remedy)
}

const SEV_SNP: &str = "/sys/module/kvm_amd/parameters/sev_snp";

fn sev_snp(wanted: bool) -> Finding {
    if is_on(SEV_SNP) {
        return Finding::pass("SEV-SNP", "on");
    }
    let remedy = "only on AMD processors that have it: switch it on in the firmware, and load kvm_amd with sev_snp=1";
    optional(wanted && !is_on("/sys/module/kvm_intel/parameters/tdx"), "SEV-SNP", "no", remedy)
}

fn huge_pages(memory: &str, wanted: bool) -> Finding {
    let (total, free) = (host::field(memory, "HugePages_Total"), host::field(memory, "HugePages_Free"));
    if total.parse::<u64>().is_ok_and(|total| total > 0) {
        let size = host::field(memory, "Hugepagesize");
        return Finding::pass("huge pages", format!("{free} of {total} free, {size} each"));
    }
    optional(wanted, "huge pages", "none reserved", "reserve some: sysctl vm.nr_hugepages=1024")
}

/// What is missing matters as much as the configuration asks for it.
fn optional(wanted: bool, subject: &str, found: &str, remedy: &str) -> Finding {
    if wanted {
        Finding::fail(subject, format!("{found}, and the configuration asks for it"), remedy)
    } else {
        Finding::warn(subject, found, format!("nothing, unless a configuration asks for it; then: {remedy}"))
    }
}

fn is_on(parameter: &str) -> bool {
    matches!(host::read(parameter).trim(), "Y" | "1")
}

/// "No such file or directory", without Rust's number.
fn reason(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |errno| nix::errno::Errno::from_raw(errno).desc().to_owned())
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn kvm_that_does_not_run_guests_fails_unless_the_hypervisor_emulates() {
        assert_eq!(kvm(Err("it gave up".into()), false).verdict, Verdict::Fail);
        assert_eq!(kvm(Err("it gave up".into()), true).verdict, Verdict::Warn);
        assert_eq!(kvm(Ok(()), false).verdict, Verdict::Pass);
    }

    #[test]
    fn what_is_missing_fails_only_when_it_is_asked_for() {
        assert_eq!(huge_pages("HugePages_Total: 0\n", false).verdict, Verdict::Warn);
        assert_eq!(huge_pages("HugePages_Total: 0\n", true).verdict, Verdict::Fail);
        let told = huge_pages("HugePages_Total: 8\nHugePages_Free: 6\nHugepagesize: 2048 kB\n", true);
        assert_eq!(told, Finding::pass("huge pages", "6 of 8 free, 2048 kB each"));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_processors_own_virtualisation_is_named() {
        assert_eq!(cpu("fpu vmx"), Finding::pass("CPU", "Intel VT-x (vmx)"));
        assert_eq!(cpu("fpu svm").found, "AMD-V (svm)");
        assert!(cpu("fpu hypervisor").found.contains("its host keeps virtualisation to itself"));
        assert_eq!(cpu("fpu vmxx").verdict, Verdict::Warn);
    }

    #[test]
    fn a_device_that_is_missing_is_named_with_its_module() {
        let told = device("x", "/dev/nonexistent", "nowhere_mod", "it is slow");
        assert_eq!(told.found, "/dev/nonexistent: No such file or directory; it is slow");
        assert_eq!(told.remedy.as_deref(), Some("modprobe nowhere_mod"));
    }

    #[test]
    fn every_subject_is_looked_at_once() {
        let subjects: Vec<_> = examine(None, None).into_iter().map(|finding| finding.subject).collect();
        let mut distinct = subjects.clone();
        distinct.dedup();
        assert_eq!((subjects.len(), &distinct), (11, &subjects));
    }
}
