//! `caisson config show`.

use std::path::Path;

use caisson_config_service::{
    check::Setting,
    installation::Installation,
    resolve::{Resolved, Resolver},
};
use serde::Serialize;

use super::absolute;
use crate::output::Format;

/// A configuration, value by value.
#[derive(Serialize)]
struct Shown<'a> {
    file: &'a str,
    settings: Vec<Value<'a>>,
}

#[derive(Serialize)]
struct Value<'a> {
    key: &'a str,
    value: &'a toml::Value,
    /// `default`, or the file and line.
    origin: String,
}

impl<'a> Value<'a> {
    fn of(setting: &'a Setting) -> Self {
        Self { key: &setting.key, value: &setting.value, origin: setting.origin() }
    }
}

pub(super) async fn run(
    installation: Installation,
    file: Option<&Path>,
    origin: bool,
    format: Format,
) -> anyhow::Result<()> {
    let resolved = Resolver::new(installation).resolve(absolute(file)?.as_deref()).await?;
    let settings = resolved.settings.iter().map(Value::of).collect();
    let shown = Shown { file: &resolved.config.origin, settings };
    format.print(&shown, |_| text(&resolved, origin))
}

/// The settings as TOML, in tables, with their origins as comments.
fn text(resolved: &Resolved, origin: bool) -> String {
    let mut text = format!("# {}\n", resolved.config.origin);
    let mut table = "";
    for setting in &resolved.settings {
        let (section, key) = setting.key.rsplit_once('.').unwrap_or(("", &setting.key));
        if section != table {
            text.push_str(&format!("\n[{section}]\n"));
            table = section;
        }
        text.push_str(&format!("{key} = {}", setting.value));
        if origin {
            text.push_str(&format!("  # {}", setting.origin()));
        }
        text.push('\n');
    }
    text
}
