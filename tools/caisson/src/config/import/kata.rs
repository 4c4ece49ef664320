//! Reads a configuration of Kata Containers with its drop-ins, as its own runtimes do.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context;
use toml::{Table, Value};

/// Longest file that is read, in bytes; Kata's own have 40 KiB.
const MAX_FILE: u64 = 1 << 20;

/// Everything that it says.
#[derive(Debug)]
pub(super) struct Kata {
    /// Links resolved.
    pub(super) file: PathBuf,
    /// In the order in which they are laid over it.
    pub(super) drop_ins: Vec<PathBuf>,
    /// Kata's name of the hypervisor in force.
    pub(super) hypervisor: Option<String>,
    /// In the order of their names.
    pub(super) settings: Vec<Setting>,
}

/// One key.
#[derive(Debug, PartialEq)]
pub(super) struct Setting {
    /// `hypervisor.qemu`, `agent.kata`, `runtime`, …
    pub(super) section: String,
    pub(super) key: String,
    pub(super) value: Value,
}

impl Setting {
    /// `hypervisor.qemu.path`
    pub(super) fn name(&self) -> String {
        if self.section.is_empty() { self.key.clone() } else { format!("{}.{}", self.section, self.key) }
    }
}

/// Reads `file` and `config.d` beside it.
pub(super) fn read(file: &Path) -> anyhow::Result<Kata> {
    let file = fs::canonicalize(file).with_context(|| format!("read {}", file.display()))?;
    let mut table = read_table(&file)?;
    let dir = file.with_file_name("config.d");
    let drop_ins = drop_ins(&dir).with_context(|| format!("read {}", dir.display()))?;
    for drop_in in &drop_ins {
        merge(&mut table, read_table(drop_in)?);
    }
    let hypervisor = hypervisor(&table);
    let mut settings = Vec::new();
    flatten("", table, &mut settings);
    Ok(Kata { file, drop_ins, hypervisor, settings })
}

/// What the Rust runtime's `hypervisor_name` says where there are several tables, or else the only table.
fn hypervisor(table: &Table) -> Option<String> {
    let named = table.get("runtime").and_then(|runtime| runtime.get("hypervisor_name")).and_then(Value::as_str);
    let tables = table.get("hypervisor")?.as_table()?;
    let named = named.filter(|name| tables.contains_key(*name));
    named.or_else(|| tables.keys().next().map(String::as_str)).map(str::to_owned)
}

fn drop_ins(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut files: Vec<_> = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    files.retain(|file| file.is_file());
    files.sort();
    Ok(files)
}

fn read_table(file: &Path) -> anyhow::Result<Table> {
    let attempt = || format!("read {}", file.display());
    let metadata = fs::metadata(file).with_context(attempt)?;
    anyhow::ensure!(metadata.is_file(), "read {}: not a file", file.display());
    anyhow::ensure!(metadata.len() <= MAX_FILE, "read {}: longer than 1 MiB", file.display());
    let text = fs::read_to_string(file).with_context(attempt)?;
    text.parse::<Table>().map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        anyhow::anyhow!("read {}:{line}: {}", file.display(), error.message().lines().next().unwrap_or_default())
    })
}

/// Tables join; everything else is replaced.
fn merge(below: &mut Table, above: Table) {
    for (key, value) in above {
        match (below.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => drop(below.insert(key, value)),
        }
    }
}

fn flatten(section: &str, table: Table, settings: &mut Vec<Setting>) {
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                let section = if section.is_empty() { key } else { format!("{section}.{key}") };
                flatten(&section, inner, settings);
            }
            value => settings.push(Setting { section: section.to_owned(), key, value }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("config.d")).unwrap();
        files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
        dir
    }

    #[test]
    fn drop_ins_are_laid_over_the_file_in_the_order_of_their_names() {
        let dir = written(&[
            ("configuration.toml", "[hypervisor.qemu]\ndefault_memory = 1\npath = \"/q\"\n"),
            ("config.d/20-b", "[hypervisor.qemu]\ndefault_memory = 3\n"),
            ("config.d/10-a.toml", "[hypervisor.qemu]\ndefault_memory = 2\n"),
        ]);
        let kata = read(&dir.path().join("configuration.toml")).unwrap();
        let values: Vec<_> = kata.settings.iter().map(|setting| (setting.name(), setting.value.to_string())).collect();
        assert_eq!(values[0], ("hypervisor.qemu.default_memory".to_owned(), "3".to_owned()));
        assert_eq!(values[1].1, "\"/q\"");
        assert_eq!(kata.drop_ins.len(), 2);
    }

    #[test]
    fn the_drop_ins_are_those_beside_the_file_that_a_link_names() {
        let dir = written(&[("real.toml", "[hypervisor.clh]\n"), ("config.d/1", "[runtime]\nenable_debug = true\n")]);
        let elsewhere = tempfile::tempdir().unwrap();
        let link = elsewhere.path().join("configuration.toml");
        std::os::unix::fs::symlink(dir.path().join("real.toml"), &link).unwrap();
        let kata = read(&link).unwrap();
        assert_eq!((kata.hypervisor.as_deref(), kata.settings.len()), (Some("clh"), 1));
    }

    #[test]
    fn the_runtimes_choice_counts_among_several_tables() {
        let dir = written(&[(
            "configuration.toml",
            "[hypervisor.dragonball]\n[hypervisor.qemu]\n[runtime]\nhypervisor_name = \"qemu\"\n",
        )]);
        assert_eq!(read(&dir.path().join("configuration.toml")).unwrap().hypervisor.as_deref(), Some("qemu"));
    }

    #[test]
    fn a_fifo_is_not_waited_for() {
        let dir = written(&[]);
        let fifo = dir.path().join("configuration.toml");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read(&fifo).unwrap_err().to_string(), format!("read {}: not a file", fifo.display()));
    }

    #[test]
    fn a_file_that_is_no_toml_is_told_with_its_line() {
        let dir = written(&[("configuration.toml", "[runtime]\nx = = 1\n")]);
        let told = read(&dir.path().join("configuration.toml")).unwrap_err().to_string();
        assert!(told.contains("configuration.toml:2: "), "{told}");
    }
}
