//! The sandboxes of this host, and how a person names one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// What a shim writes of its sandbox, `sandbox.json`.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) hypervisor: String,
    pub(crate) shim_pid: u32,
    pub(crate) launcher_pid: u32,
    pub(crate) vmm_pid: u32,
    pub(crate) created_unix_ms: u64,
}

/// A sandbox and the directory that its shim keeps for it.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    pub(crate) dir: PathBuf,
    pub(crate) record: Record,
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
        assert!(all(Path::new("/nonexistent/sandboxes")).unwrap().is_empty());
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
}
