//! What the host is: read from `/proc` and `/sys`, the same for `env` and `check`.

use std::{fs, path::Path};

use serde::Serialize;

/// As Kata Containers' `env` names it.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Host {
    /// `uname -r`
    kernel: String,
    architecture: &'static str,
    /// Whether KVM really runs a guest.
    #[serde(rename = "VMContainerCapable")]
    vm_container_capable: bool,
    distro: Distro,
    #[serde(rename = "CPU")]
    cpu: Cpu,
    memory: Memory,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Distro {
    name: String,
    version: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Cpu {
    vendor: String,
    model: String,
    #[serde(rename = "CPUs")]
    cpus: usize,
}

/// In MiB.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Memory {
    #[serde(rename = "TotalMiB")]
    pub(crate) total: u64,
    /// What could be had without swapping, as the kernel estimates it.
    #[serde(rename = "AvailableMiB")]
    pub(crate) available: u64,
}

impl Host {
    pub(crate) fn look() -> Self {
        let release = read("/etc/os-release");
        let cpu = read("/proc/cpuinfo");
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            architecture: std::env::consts::ARCH,
            vm_container_capable: caisson_vmm_launcher::kvm::probe().is_ok(),
            distro: Distro { name: assignment(&release, "NAME"), version: assignment(&release, "VERSION_ID") },
            cpu: Cpu { vendor: field(&cpu, "vendor_id"), model: field(&cpu, "model name"), cpus: cpus() },
            memory: memory(),
        }
    }
}

pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

pub(crate) fn memory() -> Memory {
    let memory = read("/proc/meminfo");
    let mib = |name| field(&memory, name).split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024;
    Memory { total: mib("MemTotal"), available: mib("MemAvailable") }
}

/// The words of the first line `name : …` in a file of `/proc`; empty when there is none.
pub(crate) fn field(text: &str, name: &str) -> String {
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

/// A file's text; empty when there is none.
pub(crate) fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Of `NAME="value"`, `os-release(5)`.
fn assignment(text: &str, name: &str) -> String {
    let mut lines = text.lines().filter_map(|line| line.split_once('='));
    lines.find(|(key, _)| *key == name).map(|(_, value)| value.trim_matches('"').to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_whatever_its_padding() {
        assert_eq!(field("model name\t: A 1\nflags : x\n", "model name"), "A 1");
        assert_eq!(field("", "flags"), "");
    }

    #[test]
    fn quotes_around_a_value_are_not_part_of_it() {
        assert_eq!(assignment("NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\n", "NAME"), "Debian GNU/Linux");
    }

    #[test]
    fn a_machine_has_memory_and_processors() {
        assert!(memory().total >= memory().available && memory().available > 0);
        assert!(cpus() > 0);
    }
}
