//! Which hypervisor the sandboxes of a private containerd use.

use std::{
    env,
    path::{Path, PathBuf},
};

use toml::Value;

use crate::{Guest, Installation};

const NAME: &str = "TESTBED_HYPERVISOR";
const KERNEL: &str = "TESTBED_KERNEL";
const INITRD: &str = "TESTBED_INITRD";
const OPTIONS: &str = "TESTBED_OPTIONS";
/// A folder of executables, each named as its hypervisor.
const FOLDER: &str = "CAISSON_HYPERVISORS";

/// A hypervisor and what its table of the configuration says.
#[derive(Clone, Debug)]
pub struct Hypervisor {
    name: String,
    program: Option<PathBuf>,
    guest: Guest,
    root_disk: Option<PathBuf>,
    options: Vec<(String, Value)>,
}

impl Hypervisor {
    /// QEMU, which runs everywhere.
    pub const QEMU: &str = "qemu";
    /// caisson's own, which needs KVM.
    pub const BUILTIN: &str = "builtin";

    /// The one that this run of the tests is about: `$TESTBED_HYPERVISOR` (QEMU unless told), with the guest
    /// `$TESTBED_KERNEL` and `$TESTBED_INITRD`, and with `$TESTBED_OPTIONS`, as `key=value key=value`, in its table.
    pub fn of_this_run(installation: &Installation) -> Self {
        let name = env::var(NAME).unwrap_or_else(|_| Self::QEMU.to_owned());
        let mut hypervisor = Self::named(&name, installation);
        if let Some(kernel) = env::var_os(KERNEL) {
            hypervisor.guest.kernel = kernel.into();
        }
        if let Some(initrd) = env::var_os(INITRD) {
            hypervisor.guest.initrd = initrd.into();
        }
        hypervisor.options = parse_options(&env::var(OPTIONS).unwrap_or_default());
        hypervisor
    }

    /// The one with this name, as the configuration has it.
    pub fn named(name: &str, installation: &Installation) -> Self {
        let program = match name {
            Self::QEMU => Some(installation.qemu.clone()),
            Self::BUILTIN => None,
            other => env::var_os(FOLDER).map(|folder| PathBuf::from(folder).join(other)),
        };
        let mut guest = installation.guest.clone();
        if name == "stratovirt" {
            // It boots compressed kernels only.
            guest.kernel.set_file_name("bzImage");
        }
        Self { name: name.to_owned(), program, guest, root_disk: None, options: Vec::new() }
    }

    /// With another guest.
    #[must_use]
    pub fn with_guest(mut self, guest: &Guest) -> Self {
        self.guest = guest.clone();
        self
    }

    /// With a guest whose root is a disk, `image`, and that has no initrd.
    #[must_use]
    pub fn with_root_disk(mut self, image: &Path) -> Self {
        self.root_disk = Some(image.to_owned());
        self
    }

    /// With `key` in its table.
    #[must_use]
    pub fn with_option(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.options.push((key.to_owned(), value.into()));
        self
    }

    /// As the configuration has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its program, if it is not caisson's own.
    pub fn program(&self) -> Option<&Path> {
        self.program.as_deref()
    }

    /// Whether its guests see directories of the host.
    pub fn shares_directories(&self) -> bool {
        !matches!(self.name.as_str(), "firecracker" | "acrn")
    }

    /// The file name of the program that holds the guest.
    pub fn process(&self) -> String {
        let name = self.program.as_ref().and_then(|program| program.file_name());
        name.map_or_else(|| format!("caisson-vmm-{}", self.name), |name| name.to_string_lossy().into_owned())
    }

    /// What its table says besides sizes and shared folders.
    pub(crate) fn table(&self) -> Vec<(String, Value)> {
        let path = |path: &Path| Value::from(path.display().to_string());
        let Guest { kernel, initrd } = &self.guest;
        let root = match &self.root_disk {
            Some(image) => ("image".to_owned(), path(image)),
            None => ("initrd".to_owned(), path(initrd)),
        };
        let mut table = vec![("kernel".to_owned(), path(kernel)), root];
        table.extend(self.program.iter().map(|program| ("path".to_owned(), path(program))));
        table.extend(self.options.iter().cloned());
        table
    }
}

/// Numbers and truth values are told from text.
fn parse_options(text: &str) -> Vec<(String, Value)> {
    let value = |text: &str| match (text.parse::<i64>(), text.parse::<bool>()) {
        (Ok(number), _) => Value::from(number),
        (_, Ok(truth)) => Value::from(truth),
        _ => Value::from(text),
    };
    let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, text)| (key.to_owned(), value(text))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_keep_their_types() {
        let options = parse_options("accel=kvm default_vcpus=2 hugepages=true");
        let expected = [("accel", Value::from("kvm")), ("default_vcpus", 2.into()), ("hugepages", true.into())];
        assert_eq!(options, expected.map(|(key, value)| (key.to_owned(), value)));
    }
}
