//! What this machine offers to guests, beyond what a hypervisor does.

use std::fs;

/// Documentation/admin-guide/mm/hugetlbpage.rst
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// How much memory is reserved in huge pages of 2 MiB, or can be had beyond the reserve.
pub(crate) fn huge_pages_mib() -> u64 {
    let number = |name: &str| -> u64 { read(&format!("{HUGE_PAGES}/{name}")).parse().unwrap_or_default() };
    2 * number("nr_hugepages").saturating_add(number("nr_overcommit_hugepages"))
}

/// Whether KVM has switched on this kind of confidential guest, `tdx` or `sev-snp`.
pub(crate) fn starts_confidential(kind: &str) -> bool {
    let parameter = match kind {
        "tdx" => "/sys/module/kvm_intel/parameters/tdx",
        "sev-snp" => "/sys/module/kvm_amd/parameters/sev_snp",
        _ => return false,
    };
    matches!(read(parameter).as_str(), "Y" | "1")
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}
