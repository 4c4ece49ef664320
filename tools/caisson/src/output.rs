//! What a verb prints: text for people, or JSON for programs.

use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// `--json`, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Text,
    Json,
}

impl Format {
    /// Prints `value`; `text` says it for people.
    pub(crate) fn print<T: Serialize + ?Sized>(self, value: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        let printed = match self {
            Self::Json => serde_json::to_string_pretty(value)?,
            Self::Text => text(value),
        };
        Ok(writeln!(io::stdout(), "{}", printed.trim_end_matches('\n'))?)
    }
}

/// A table without lines, one column for each word of `header`.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}
