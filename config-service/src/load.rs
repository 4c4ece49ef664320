//! Reads a configuration and its drop-ins into one document.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use crate::{
    document::{self, Table},
    hypervisor,
    problem::{Place, Problem},
    watch::Watch,
};

/// The folder of drop-ins, beside the configuration itself.
pub(crate) const DROP_IN_DIR: &str = "config.d";
/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Reads `file` and lays `config.d/*.toml` over it, in the order of their names.
///
/// # Errors
/// What cannot be read or is no TOML, of all files.
pub(crate) fn load(file: &Path, watch: &mut Watch) -> Result<Table, Vec<Problem>> {
    let mut files = vec![file.to_owned()];
    files.extend(drop_ins(file, watch)?);
    let mut document = Table::new();
    let mut problems = Vec::new();
    for (layer, file) in files.iter().enumerate() {
        match read(file, layer, watch) {
            Ok(table) => document::merge(&mut document, table),
            Err(found) => problems.extend(found),
        }
    }
    if problems.is_empty() { Ok(document) } else { Err(problems) }
}

fn drop_ins(file: &Path, watch: &mut Watch) -> Result<Vec<PathBuf>, Vec<Problem>> {
    let dir = file.with_file_name(DROP_IN_DIR);
    watch.look(&dir);
    let names = || fs::read_dir(&dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
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

fn read(file: &Path, layer: usize, watch: &mut Watch) -> Result<Table, Vec<Problem>> {
    let text = read_text(file, layer, watch).map_err(|problem| vec![problem])?;
    let mut table = document::parse(&text, layer, file)?;
    hypervisor::canonicalise(&mut table)?;
    Ok(table)
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
        let place = Place {
            layer,
            line: before.iter().filter(|byte| **byte == b'\n').count() + 1,
            column: String::from_utf8_lossy(&before[line_start..]).chars().count() + 1,
            file: file.into(),
        };
        Problem::at(place, "not UTF-8")
    })
}
