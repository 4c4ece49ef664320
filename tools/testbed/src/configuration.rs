//! The configuration file that one private containerd's sandboxes are made from.

use std::{env, fs, path::Path};

use anyhow::{Context, Result};
use toml::{Table, Value};

use crate::{Hypervisor, Installation};

/// In the folder for temporary files: the layers that guests without shared directories see as disks.
const LAYERS: &str = "caisson-testbed-layers";

/// A configuration in the making. What it does not say is left to caisson's defaults.
#[derive(Clone, Debug)]
pub struct Configuration {
    hypervisor: Hypervisor,
    tables: Table,
}

impl Configuration {
    /// The hypervisor that this run is about, with the guest of `installation`.
    pub fn of_this_run(installation: &Installation) -> Self {
        Self::new(Hypervisor::of_this_run(installation), installation)
    }

    /// `hypervisor`, with the guest of `installation`.
    pub fn new(hypervisor: Hypervisor, installation: &Installation) -> Self {
        let table = hypervisor.table();
        let mut configuration = Self { hypervisor, tables: Table::new() }
            .with_option("default_memory", 256)
            .with("runtime.log_level", "info");
        configuration = if configuration.hypervisor.shares_directories() {
            configuration.with_option("virtio_fs_daemon", path(&installation.virtiofsd))
        } else {
            // Its containers' root file systems are disks, which are not kept with the host's own.
            configuration.with_option("layer_cache_path", path(&env::temp_dir().join(LAYERS)))
        };
        for (key, value) in table {
            configuration = configuration.with_option(&key, value);
        }
        configuration
    }

    /// Sets `key` of the hypervisor's table.
    #[must_use]
    pub fn with_option(self, key: &str, value: impl Into<Value>) -> Self {
        let key = format!("hypervisor.{}.{key}", self.hypervisor.name());
        self.with(&key, value)
    }

    /// Leaves `key` of the hypervisor's table to its default.
    #[must_use]
    pub fn without_option(mut self, key: &str) -> Self {
        let tables = self.tables.get_mut("hypervisor").and_then(Value::as_table_mut);
        if let Some(Value::Table(table)) = tables.and_then(|tables| tables.get_mut(self.hypervisor.name())) {
            table.remove(key);
        }
        self
    }

    /// Sets the dotted `key`, making the tables on the way to it.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        let (tables, last) = key.rsplit_once('.').unwrap_or(("", key));
        let mut table = &mut self.tables;
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

    /// What the sandboxes use.
    pub fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }

    /// # Errors
    /// When `path` cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.tables.to_string()).with_context(|| format!("write {}", path.display()))
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Archives, Guest};

    fn configuration() -> Configuration {
        let archives = Archives { busybox: "/busybox".into(), nginx: "/nginx".into() };
        let guest = Guest { kernel: "/kernel".into(), initrd: "/initrd".into() };
        let installation = Installation {
            programs: "/programs".into(),
            qemu: "/qemu".into(),
            guest: guest.clone(),
            debian_guest: guest,
            virtiofsd: "/virtiofsd".into(),
            archives,
        };
        Configuration::new(Hypervisor::named(Hypervisor::BUILTIN, &installation), &installation)
    }

    #[test]
    fn a_dotted_key_becomes_nested_tables() {
        let configuration = configuration().with("a.b.c", 1).with("a.b.d", "x").with("e", true);
        assert_eq!(configuration.tables["a"]["b"]["c"].as_integer(), Some(1));
        assert_eq!(configuration.tables["a"]["b"]["d"].as_str(), Some("x"));
        assert_eq!(configuration.tables["e"].as_bool(), Some(true));
    }

    #[test]
    fn the_last_value_of_a_key_counts() {
        let configuration = configuration().with_option("kernel", "/other");
        assert_eq!(configuration.tables["hypervisor"]["builtin"]["kernel"].as_str(), Some("/other"));
    }

    #[test]
    fn a_key_that_is_left_to_its_default_is_not_written() {
        let configuration = configuration().without_option("virtio_fs_daemon");
        assert!(configuration.tables["hypervisor"]["builtin"].get("virtio_fs_daemon").is_none());
    }

    #[test]
    fn a_hypervisor_of_caissons_own_has_no_path() {
        assert!(configuration().tables["hypervisor"]["builtin"].get("path").is_none());
    }
}
