//! The configuration file that one private containerd's sandboxes are made from.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use toml::{Table, Value};

use crate::Installation;

/// A configuration in the making. What it does not say is left to caisson's defaults.
#[derive(Clone, Debug)]
pub struct Configuration(Table);

impl Configuration {
    /// QEMU with the guest of `installation`.
    pub fn for_qemu(installation: &Installation) -> Self {
        Self(Table::new())
            .with("hypervisor.qemu.path", path(&installation.qemu))
            .with("hypervisor.qemu.kernel", path(&installation.kernel))
            .with("hypervisor.qemu.initrd", path(&installation.initrd))
            .with("hypervisor.qemu.virtio_fs_daemon", path(&installation.virtiofsd))
            .with("hypervisor.qemu.default_memory", 256)
            .with("runtime.log_level", "info")
    }

    /// Sets the dotted `key`, making the tables on the way to it.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        let (tables, last) = key.rsplit_once('.').unwrap_or(("", key));
        let mut table = &mut self.0;
        for name in tables.split('.').filter(|name| !name.is_empty()) {
            let entry = table.entry(name).or_insert_with(|| Table::new().into());
            if !entry.is_table() {
                *entry = Table::new().into();
            }
            let Value::Table(inner) = entry else { unreachable!("made a table above") };
            table = inner;
        }
        table.insert(last.to_owned(), value.into());
        self
    }

    /// # Errors
    /// When `path` cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.0.to_string()).with_context(|| format!("write {}", path.display()))
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dotted_key_becomes_nested_tables() {
        let configuration = Configuration(Table::new()).with("a.b.c", 1).with("a.b.d", "x").with("e", true);
        assert_eq!(configuration.0["a"]["b"]["c"].as_integer(), Some(1));
        assert_eq!(configuration.0["a"]["b"]["d"].as_str(), Some("x"));
        assert_eq!(configuration.0["e"].as_bool(), Some(true));
    }

    #[test]
    fn the_last_value_of_a_key_counts() {
        let configuration = Configuration(Table::new()).with("a.b", 1).with("a.b", 2);
        assert_eq!(configuration.0["a"]["b"].as_integer(), Some(2));
    }
}
