//! `caisson sandbox`, and how a person names one.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use caisson_protocol::paths;
use clap::Subcommand;
use comfy_table::{Table, presets};
use serde::{Deserialize, Serialize};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the sandboxes of this host, oldest first.
    List {
        /// As JSON, for programs.
        #[arg(long)]
        json: bool,
    },
}

/// What a shim writes of its sandbox, `sandbox.json`.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) namespace: String,
    pub(crate) id: String,
    hypervisor: String,
    shim_pid: u32,
    launcher_pid: u32,
    vmm_pid: u32,
    created_unix_ms: u64,
}

/// A sandbox and the directory that its shim keeps for it.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    pub(crate) dir: PathBuf,
    pub(crate) record: Record,
}

pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    let Command::List { json } = command;
    let records: Vec<_> = all(&paths::sandboxes_dir())?.into_iter().map(|sandbox| sandbox.record).collect();
    let text = if json { serde_json::to_string_pretty(&records)? } else { table(&records, SystemTime::now()) };
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Every sandbox below `dir`, oldest first.
pub(crate) fn all(dir: &Path) -> anyhow::Result<Vec<Sandbox>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // No sandbox was ever made.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("list sandboxes in {}", dir.display())),
    };
    let mut sandboxes = Vec::new();
    for entry in entries {
        let dir = entry.with_context(|| format!("list sandboxes in {}", dir.display()))?.path();
        match read(&dir) {
            Ok(sandbox) => sandboxes.extend(sandbox),
            Err(error) => eprintln!("caisson: {error:#}"),
        }
    }
    sandboxes.sort_by(|a, b| (a.record.created_unix_ms, &a.record.id).cmp(&(b.record.created_unix_ms, &b.record.id)));
    Ok(sandboxes)
}

/// The one sandbox whose id is `name`, or begins with it.
pub(crate) fn find(dir: &Path, name: &str) -> anyhow::Result<Sandbox> {
    let mut sandboxes = all(dir)?;
    let exact: Vec<_> = sandboxes.iter().filter(|sandbox| sandbox.record.id == name).cloned().collect();
    let matching = if exact.is_empty() {
        sandboxes.iter().filter(|sandbox| sandbox.record.id.starts_with(name)).cloned().collect()
    } else {
        exact
    };
    match <[_; 1]>::try_from(matching) {
        Ok([sandbox]) => Ok(sandbox),
        Err(none) if none.is_empty() && sandboxes.is_empty() => bail!("no sandbox {name}: none is running"),
        Err(none) if none.is_empty() => bail!("no sandbox {name}; running: {}", names(&sandboxes)),
        Err(several) => {
            sandboxes = several;
            bail!("several sandboxes are called {name}: {}", names(&sandboxes))
        }
    }
}

/// None while its shim has not written the record yet, or has just removed it.
fn read(dir: &Path) -> anyhow::Result<Option<Sandbox>> {
    let path = dir.join("sandbox.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let record = serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?;
    Ok(Some(Sandbox { dir: dir.to_owned(), record }))
}

fn names(sandboxes: &[Sandbox]) -> String {
    let names: Vec<_> = sandboxes.iter().map(|s| format!("{} ({})", s.record.id, s.record.namespace)).collect();
    names.join(", ")
}

fn table(records: &[Record], now: SystemTime) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["NAMESPACE", "SANDBOX", "HYPERVISOR", "AGE", "SHIM", "LAUNCHER", "VMM"]);
    for record in records {
        let created = UNIX_EPOCH + Duration::from_millis(record.created_unix_ms);
        let age = now.duration_since(created).unwrap_or_default();
        // A sandbox that only begins has no hypervisor and no processes but its shim.
        let hypervisor = if record.hypervisor.is_empty() { "-" } else { &record.hypervisor };
        let pids = [record.shim_pid, record.launcher_pid, record.vmm_pid];
        let [shim, launcher, vmm] = pids.map(|pid| if pid == 0 { "-".to_owned() } else { pid.to_string() });
        table.add_row([&record.namespace, &record.id, hypervisor, &short(age), &shim, &launcher, &vmm]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// In the largest unit of which there is at least one.
fn short(age: Duration) -> String {
    match age.as_secs() {
        seconds @ ..60 => format!("{seconds}s"),
        seconds @ ..3_600 => format!("{}m", seconds / 60),
        seconds @ ..86_400 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, created_unix_ms: u64) -> Record {
        let (namespace, hypervisor) = ("k8s.io".to_owned(), "qemu".to_owned());
        Record { namespace, id: id.to_owned(), hypervisor, shim_pid: 1, launcher_pid: 2, vmm_pid: 3, created_unix_ms }
    }

    fn host(records: &[Record]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (number, record) in records.iter().enumerate() {
            let sandbox = dir.path().join(number.to_string());
            fs::create_dir(&sandbox).unwrap();
            fs::write(sandbox.join("sandbox.json"), serde_json::to_string(record).unwrap()).unwrap();
        }
        dir
    }

    #[test]
    fn a_host_without_the_directory_has_no_sandboxes() {
        assert!(all(Path::new("/nowhere/sandboxes")).unwrap().is_empty());
    }

    #[test]
    fn sandboxes_are_listed_oldest_first() {
        let host = host(&[record("young", 2), record("old", 1)]);
        let ids: Vec<_> = all(host.path()).unwrap().into_iter().map(|sandbox| sandbox.record.id).collect();
        assert_eq!(ids, ["old", "young"]);
    }

    #[test]
    fn a_sandbox_without_a_record_or_with_a_broken_one_is_left_out() {
        let host = host(&[record("web", 1)]);
        fs::create_dir(host.path().join("starting")).unwrap();
        fs::create_dir(host.path().join("broken")).unwrap();
        fs::write(host.path().join("broken/sandbox.json"), "{").unwrap();
        assert_eq!(all(host.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_unique_prefix_names_a_sandbox() {
        let host = host(&[record("web-1", 1), record("db-1", 2)]);
        assert_eq!(find(host.path(), "we").unwrap().record.id, "web-1");
    }

    #[test]
    fn an_exact_id_wins_over_longer_ones() {
        let host = host(&[record("web", 1), record("web-1", 2)]);
        assert_eq!(find(host.path(), "web").unwrap().record.id, "web");
    }

    #[test]
    fn an_ambiguous_prefix_gets_the_candidates() {
        let host = host(&[record("web-1", 1), record("web-2", 2), record("db", 3)]);
        let told = find(host.path(), "web").unwrap_err().to_string();
        assert_eq!(told, "several sandboxes are called web: web-1 (k8s.io), web-2 (k8s.io)");
    }

    #[test]
    fn an_unknown_name_gets_the_list() {
        let host = host(&[record("db", 3)]);
        assert_eq!(find(host.path(), "web").unwrap_err().to_string(), "no sandbox web; running: db (k8s.io)");
    }

    #[test]
    fn the_table_names_every_column() {
        let text = table(&[record("web", 0)], UNIX_EPOCH + Duration::from_secs(7200));
        let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["NAMESPACE", "SANDBOX", "HYPERVISOR", "AGE", "SHIM", "LAUNCHER", "VMM"]);
        assert_eq!(lines[1], ["k8s.io", "web", "qemu", "2h", "1", "2", "3"]);
    }
}
