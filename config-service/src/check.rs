//! Gives a merged document its meaning: every key known, every value of its type and within its range.
//!
//! Rules about several keys are in `rules`.

use std::path::PathBuf;

use caisson_protocol::config::SandboxConfig;
use toml::Value;

use crate::{
    backend::BackendOption,
    document::{Content, Entry, Table},
    files::Wanted,
    hypervisor::Hypervisor,
    keys::{AGENT, HYPERVISOR, Key, RUNTIME, Takes},
    problem::{Place, Problem, describe, suggest},
};

/// One value that is in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// `hypervisor.qemu.default_memory`
    pub key: String,
    /// What is in force.
    pub value: Value,
    /// Where it is written; a default is written nowhere.
    pub origin: Option<Place>,
}

impl Setting {
    /// `default`, or the file and line.
    pub fn origin(&self) -> String {
        self.origin.as_ref().map_or_else(|| "default".to_owned(), |at| format!("{}:{}", at.file.display(), at.line))
    }
}

/// A file that a setting names.
#[derive(Debug)]
pub(crate) struct NamedFile {
    pub(crate) key: &'static str,
    pub(crate) setting: usize,
    pub(crate) path: PathBuf,
    pub(crate) wanted: Wanted,
}

/// What came of a document: a configuration to use if there are no problems.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    pub(crate) config: SandboxConfig,
    pub(crate) settings: Vec<Setting>,
    pub(crate) files: Vec<NamedFile>,
    pub(crate) problems: Vec<Problem>,
}

/// Checks `document` for `hypervisor`. `options` are its backend's, none when they could not be had; tables of other
/// hypervisors are not looked into.
pub(crate) fn check(document: &Table, hypervisor: Option<&Hypervisor>, options: Option<&[BackendOption]>) -> Checked {
    let mut checked = Checked::default();
    checked.top_level(document);
    if let Some(hypervisor) = hypervisor {
        checked.config.hypervisor.clone_from(&hypervisor.name);
        let table = document.get("hypervisor").and_then(|entry| table_in(entry)?.get(&hypervisor.name));
        checked.hypervisor(&format!("hypervisor.{}", hypervisor.name), table, options);
    }
    checked.section("agent", document.get("agent"), AGENT);
    checked.section("runtime", document.get("runtime"), RUNTIME);
    checked
}

impl Checked {
    fn top_level(&mut self, document: &Table) {
        for (key, entry) in document {
            match (key.as_str(), &entry.content) {
                ("hypervisor" | "agent" | "runtime", Content::Table(_)) => {}
                // Their sections report the wrong type themselves.
                ("agent" | "runtime", Content::Plain(_)) => {}
                ("hypervisor", Content::Plain(value)) => {
                    self.wrong(entry, key, format!("found {}, expected a table", describe(value)));
                }
                (unknown, _) => {
                    let suggestion = suggest(unknown, ["hypervisor", "agent", "runtime"]);
                    self.wrong(entry, unknown, format!("unknown table{suggestion}"));
                }
            }
        }
    }

    fn hypervisor(&mut self, section: &str, entry: Option<&Entry>, options: Option<&[BackendOption]>) {
        let table = self.table(section, entry);
        for key in HYPERVISOR {
            let default = options.and_then(|options| options.iter().find(|option| option.key == key.name)?.default());
            self.apply(section, key, table.get(key.name), default);
        }
        let Some(options) = options else { return };
        let mut own = toml::Table::new();
        for (name, entry) in table.iter().filter(|(name, _)| !is_key(HYPERVISOR, name)) {
            let value = entry.to_value();
            match options.iter().find(|option| option.key == *name).map(|option| option.examine(&value)) {
                Some(Ok(())) => drop(own.insert(name.clone(), value)),
                Some(Err(text)) => self.wrong(entry, &format!("{section}.{name}"), text),
                None => {
                    let names = HYPERVISOR.iter().map(|key| key.name).chain(options.iter().map(|o| o.key.as_str()));
                    self.unknown(section, name, entry, names);
                }
            }
        }
        for option in options.iter().filter(|option| !is_key(HYPERVISOR, &option.key)) {
            let origin = table.get(&option.key).map(|entry| entry.place.clone());
            if let Some(value) = own.get(&option.key).cloned().or_else(|| option.default()) {
                self.settings.push(Setting { key: format!("{section}.{}", option.key), value, origin });
            }
        }
        self.config.options = own.to_string();
    }

    fn section(&mut self, section: &str, entry: Option<&Entry>, keys: &'static [Key]) {
        let table = self.table(section, entry);
        for key in keys {
            self.apply(section, key, table.get(key.name), None);
        }
        for (name, entry) in table.iter().filter(|(name, _)| !is_key(keys, name)) {
            self.unknown(section, name, entry, keys.iter().map(|key| key.name));
        }
    }

    fn table(&mut self, section: &str, entry: Option<&Entry>) -> Table {
        match entry.map(|entry| (entry, &entry.content)) {
            None => Table::new(),
            Some((_, Content::Table(table))) => table.clone(),
            Some((entry, Content::Plain(value))) => {
                self.wrong(entry, section, format!("found {}, expected a table", describe(value)));
                Table::new()
            }
        }
    }

    /// Applies what is written for `key`, or else a default: the backend's, or the key's own.
    fn apply(&mut self, section: &str, key: &'static Key, entry: Option<&Entry>, backend: Option<Value>) {
        let value = entry.map(Entry::to_value).or(backend).or_else(|| default_of(key)).unwrap_or_else(|| "".into());
        let name = format!("{section}.{}", key.name);
        let place = entry.map(|entry| &entry.place);
        match self.set(key, &value) {
            Ok(()) => self.settings.push(Setting { key: name, value, origin: place.cloned() }),
            Err(text) => self.problems.push(Problem::of_key(place, name, text)),
        }
    }

    fn set(&mut self, key: &'static Key, value: &Value) -> Result<(), String> {
        let config = &mut self.config;
        match (&key.takes, value) {
            (Takes::Bool(set), Value::Boolean(value)) => set(config, *value),
            (Takes::Integer(min, max, set), Value::Integer(value)) if (min..=max).contains(&value) => {
                set(config, *value)
            }
            (Takes::Text(set), Value::String(text)) => set(config, one_line(text)?),
            (Takes::Choice(words, set), Value::String(word)) if words.contains(&word.as_str()) => {
                set(config, word.clone());
            }
            (Takes::File(set), Value::String(path)) => {
                set(config, one_line(path)?);
                self.name_file(key.name, path, Wanted::File);
            }
            (Takes::Program(set), Value::String(path)) => {
                set(config, one_line(path)?);
                self.name_file(key.name, path, Wanted::Program);
            }
            (Takes::Texts(set), Value::Array(values)) => set(config, texts(values)?),
            (takes, value) => {
                let near = match (takes, value) {
                    (Takes::Choice(words, _), Value::String(word)) => nearest(word, words),
                    _ => String::new(),
                };
                return Err(format!("found {}, expected {takes}{near}", describe(value)));
            }
        }
        Ok(())
    }

    fn name_file(&mut self, key: &'static str, path: &str, wanted: Wanted) {
        if !path.is_empty() {
            self.files.push(NamedFile { key, setting: self.settings.len(), path: path.into(), wanted });
        }
    }

    fn unknown<'a>(&mut self, section: &str, name: &str, entry: &Entry, accepted: impl Iterator<Item = &'a str>) {
        let elsewhere = [("[hypervisor.<name>]", HYPERVISOR), ("[agent]", AGENT), ("[runtime]", RUNTIME)]
            .into_iter()
            .find(|(_, keys)| is_key(keys, name));
        let hint = match elsewhere {
            Some((table, _)) => format!("; it belongs to {table}"),
            None => suggest(name, accepted),
        };
        self.wrong(entry, &format!("{section}.{name}"), format!("unknown key{hint}"));
    }

    fn wrong(&mut self, entry: &Entry, key: &str, text: String) {
        self.problems.push(Problem::of_key(Some(&entry.place), key, text));
    }
}

fn table_in(entry: &Entry) -> Option<&Table> {
    match &entry.content {
        Content::Table(table) => Some(table),
        Content::Plain(_) => None,
    }
}

fn is_key(keys: &[Key], name: &str) -> bool {
    keys.iter().any(|key| key.name == name)
}

/// A key's default as a value; a test reads them all.
fn default_of(key: &Key) -> Option<Value> {
    toml::from_str::<toml::Table>(&format!("value = {}", key.default)).ok()?.remove("value")
}

fn nearest(word: &str, words: &[&str]) -> String {
    let suggestion = suggest(word, words.iter().copied());
    if suggestion.contains("did you mean") { suggestion } else { String::new() }
}

fn one_line(text: &str) -> Result<String, String> {
    if text.chars().any(char::is_control) {
        return Err(format!("found {}, expected a string without control characters", crate::problem::quote(text)));
    }
    Ok(text.to_owned())
}

fn texts(values: &[Value]) -> Result<Vec<String>, String> {
    values
        .iter()
        .map(|value| match value {
            Value::String(text) => one_line(text),
            other => Err(format!("found {} among its elements, expected an array of strings", describe(other))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_accepted_by_its_own_key() {
        let mut checked = Checked::default();
        for key in HYPERVISOR.iter().chain(AGENT).chain(RUNTIME) {
            let value = default_of(key).unwrap_or_else(|| panic!("the default of {} is no TOML", key.name));
            assert_eq!(checked.set(key, &value), Ok(()), "{}", key.name);
        }
    }
}
