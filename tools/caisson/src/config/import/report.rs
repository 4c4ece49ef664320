//! What an import has done, for people and for programs.

use std::path::PathBuf;

use serde::Serialize;

use super::translate::{Entry, Fate};

/// All of it.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) from: PathBuf,
    pub(super) drop_ins: Vec<PathBuf>,
    pub(super) to: Option<PathBuf>,
    pub(super) configuration: String,
    pub(super) entries: Vec<Entry>,
    pub(super) notes: Vec<String>,
    /// What is still wrong with it on this host.
    pub(super) problems: Vec<String>,
}

impl Report {
    /// Key by key, by what became of them.
    pub(super) fn text(&self) -> String {
        let mut text = format!("{}", self.from.display());
        self.drop_ins.iter().for_each(|drop_in| text.push_str(&format!(" + {}", drop_in.display())));
        if let Some(to) = &self.to {
            text.push_str(&format!(" -> {}", to.display()));
        }
        text.push('\n');
        text.push_str(&section(
            "carried over",
            self.lines(|entry| match &entry.fate {
                Fate::CarriedOver => Some(format!("{} = {}", entry.key, entry.value)),
                Fate::Renamed { .. } | Fate::Off | Fate::NoEquivalent { .. } => None,
            }),
        ));
        text.push_str(&section(
            "renamed or rewritten",
            self.lines(|entry| match &entry.fate {
                Fate::Renamed { becomes, new_value } => {
                    Some(format!("{} = {}  ->  {becomes} = {new_value}", entry.key, entry.value))
                }
                Fate::CarriedOver | Fate::Off | Fate::NoEquivalent { .. } => None,
            }),
        ));
        text.push_str(&section(
            "no equivalent",
            self.lines(|entry| match &entry.fate {
                Fate::NoEquivalent { reason } => Some(format!("{} = {}: {reason}", entry.key, entry.value)),
                Fate::CarriedOver | Fate::Renamed { .. } | Fate::Off => None,
            }),
        ));
        text.push_str(&section(
            "off or empty, as without them",
            self.lines(|entry| match &entry.fate {
                Fate::Off => Some(format!("{} = {}", entry.key, entry.value)),
                Fate::CarriedOver | Fate::Renamed { .. } | Fate::NoEquivalent { .. } => None,
            }),
        ));
        text.push_str(&section("to mend before it can be used here", self.problems.clone()));
        self.notes.iter().for_each(|note| text.push_str(&format!("\nnote: {note}\n")));
        text
    }

    fn lines(&self, line: impl Fn(&Entry) -> Option<String>) -> Vec<String> {
        self.entries.iter().filter_map(line).collect()
    }
}

fn section(heading: &str, lines: Vec<String>) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let lines: String = lines.iter().map(|line| format!("  {line}\n")).collect();
    format!("\n{heading}:\n{lines}")
}
