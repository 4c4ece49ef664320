//! Reads a configuration and its drop-ins into one document.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    document::{self, Content, Table},
    hypervisor,
    installation::Found,
    problem::{Place, Problem},
    watch::Watch,
};

/// The folder of drop-ins.
pub(crate) const DROP_IN_DIR: &str = "config.d";
/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most files that one configuration is made of.
const MAX_LAYERS: usize = 1000;

/// One file of a configuration.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Layer {
    pub(crate) file: PathBuf,
    pub(crate) text: String,
}

/// Reads the configuration and its drop-ins: `config.d/*.toml` beside the file, then beside the link to it where that
/// is elsewhere, each in the order of their names.
///
/// # Errors
/// What cannot be read, of all files.
pub(crate) fn read(found: &Found, watch: &mut Watch) -> Result<Vec<Layer>, Vec<Problem>> {
    let mut files = vec![found.file.clone()];
    let dirs = [found.file.with_file_name(DROP_IN_DIR), found.link.with_file_name(DROP_IN_DIR)];
    for dir in &dirs[..if is_same(&dirs) { 1 } else { 2 }] {
        files.extend(drop_ins(dir, watch)?);
    }
    if files.len() > MAX_LAYERS {
        let text = format!("read {}: more than {} drop-ins", found.file.display(), MAX_LAYERS - 1);
        return Err(vec![Problem::general(text)]);
    }
    let (mut layers, mut problems) = (Vec::new(), Vec::new());
    for (number, file) in files.into_iter().enumerate() {
        match read_text(&file, number, watch) {
            Ok(text) => layers.push(Layer { file, text }),
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(layers) } else { Err(problems) }
}

/// Makes one document of `layers`.
///
/// # Errors
/// What is no TOML, in all of them.
pub(crate) fn merge(layers: &[Layer]) -> Result<Table, Vec<Problem>> {
    let (mut document, mut problems) = (Table::new(), Vec::new());
    for (number, layer) in layers.iter().enumerate() {
        let table = document::parse(&layer.text, number, &layer.file);
        match table.and_then(canonical) {
            Ok(table) => document::merge(&mut document, table),
            Err(found) => problems.extend(found),
        }
    }
    if problems.is_empty() { Ok(document) } else { Err(problems) }
}

/// Gives tables that have two names the one that everything else knows.
fn canonical(mut table: Table) -> Result<Table, Vec<Problem>> {
    hypervisor::canonicalise(&mut table)?;
    join_agents(&mut table)?;
    Ok(table)
}

/// `[agent.kata]` is Kata Containers' name for `[agent]`.
fn join_agents(table: &mut Table) -> Result<(), Vec<Problem>> {
    const KATA: &str = "kata";
    let Some(Content::Table(agent)) = table.get_mut("agent").map(|entry| &mut entry.content) else { return Ok(()) };
    let Some(kata) = agent.get(KATA) else { return Ok(()) };
    let Content::Table(keys) = kata.content.clone() else { return Ok(()) };
    agent.remove(KATA);
    let mut problems = Vec::new();
    for (key, entry) in keys {
        match agent.get(&key) {
            Some(other) => {
                let text =
                    format!("is another name of agent.{key}, which stands at {}; write one of them", other.place);
                problems.push(Problem::of_key(Some(&entry.place), format!("agent.{KATA}.{key}"), text));
            }
            None => drop(agent.insert(key, entry)),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

fn is_same([one, other]: &[PathBuf; 2]) -> bool {
    one == other
        || fs::canonicalize(one).ok().is_some_and(|one| fs::canonicalize(other).is_ok_and(|other| one == other))
}

fn drop_ins(dir: &Path, watch: &mut Watch) -> Result<Vec<PathBuf>, Vec<Problem>> {
    watch.look(dir);
    let names = || fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
    let mut names = match names() {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(vec![Problem::general(format!("list drop-ins {}: {error}", dir.display()))]),
    };
    names.retain(|name| is_drop_in(name));
    names.sort();
    Ok(names.iter().map(|name| dir.join(name)).collect())
}

/// Not what an editor leaves behind: `.x.toml`, `x.toml~`.
fn is_drop_in(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.ends_with(b".toml") && !name.starts_with(b".")
}

fn read_text(file: &Path, layer: usize, watch: &mut Watch) -> Result<String, Problem> {
    let refuse = |why: &str| Problem::general(format!("read {}: {why}", file.display()));
    // A pipe would never end.
    if watch.look(file).is_some_and(|metadata| !metadata.is_file()) {
        return Err(refuse("not a file"));
    }
    let mut bytes = Vec::new();
    File::open(file)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(|error| refuse(&error.to_string()))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(refuse("longer than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        let place = Place::File {
            layer,
            line: before.iter().filter(|byte| **byte == b'\n').count() + 1,
            column: String::from_utf8_lossy(&before[line_start..]).chars().count() + 1,
            file: file.into(),
        };
        Problem::at(place, "not UTF-8")
    })
}
