//! No path waits by the clock: whatever is waited for is an event. Tests may; the sources may not.

use std::{
    fs,
    path::{Path, PathBuf},
};

use caisson_testbed::Installation;

const TIMED_WAITS: [&str; 5] = ["sleep(", "sleep_until(", "interval(", "interval_at(", "park_timeout("];

#[test]
fn no_source_sleeps() {
    let mut sources = Vec::new();
    collect_sources(Installation::workspace(), &mut sources);
    assert!(sources.len() > 20, "the sources were not found: {sources:?}");
    let found: Vec<String> = sources.iter().flat_map(|path| timed_waits(path)).collect();
    assert!(found.is_empty(), "waits by the clock:\n{}", found.join("\n"));
}

/// The sources of programs and libraries: `src`, without `tests`, build output and hidden folders.
fn collect_sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("read the checkout").flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if path.is_dir() && !["target", "tests", "fuzz"].contains(&&*name) && !name.starts_with('.') {
            collect_sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// Unit tests are last in a file.
fn timed_waits(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).expect("read a source");
    let product = text.split("#[cfg(test)]").next().unwrap_or_default();
    let waits =
        |line: &&str| !line.trim_start().starts_with("//") && TIMED_WAITS.iter().any(|wait| line.contains(wait));
    let lines = product.lines().enumerate().filter(|(_, line)| waits(line));
    lines.map(|(number, line)| format!("{}:{}: {}", path.display(), number + 1, line.trim())).collect()
}
