//! Gives a merged document its meaning: every key known, every value of its type and within its range.
//!
//! Rules about several keys are in `rules`.

use std::path::PathBuf;

use caisson_protocol::config::SandboxConfig;
use glob::Pattern;
use toml::Value;

use crate::{
    document::{Content, Entry, Table, find},
    files::Wanted,
    keys::{AGENT, Draft, HYPERVISOR, Key, RUNTIME, Takes, valid_paths},
    launchers::LauncherOption,
    problem::{Place, Problem, describe, nearest, quote, suggest},
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
    /// `default`, the file and line, or the annotation.
    pub fn origin(&self) -> String {
        self.origin.as_ref().map_or_else(|| "default".to_owned(), Place::line)
    }
}

/// A file that a setting names.
#[derive(Debug)]
pub(crate) struct NamedFile {
    /// The setting's place among the settings.
    pub(crate) setting: usize,
    pub(crate) path: PathBuf,
    pub(crate) wanted: Wanted,
}

/// What came of a document: a configuration to use if there are no problems.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) config: SandboxConfig,
    pub(crate) settings: Vec<Setting>,
    pub(crate) files: Vec<NamedFile>,
    pub(crate) problems: Vec<Problem>,
    pub(crate) refused: Vec<Refused>,
}

/// A value that the launcher's key does not take, and another launcher's may.
#[derive(Debug)]
pub(crate) struct Refused {
    /// The problem's place among the problems.
    pub(crate) problem: usize,
    pub(crate) key: String,
    pub(crate) value: Value,
}

/// Checks `document` for `hypervisor`. `options` are its launcher's, none when they could not be had; tables of other
/// hypervisors are not looked into.
pub(crate) fn check(document: &Table, hypervisor: Option<&str>, options: Option<&[LauncherOption]>) -> Checked {
    let mut check = Check::default();
    check.top_level(document);
    if let Some(hypervisor) = hypervisor {
        check.draft.config.hypervisor = hypervisor.to_owned();
        check.hypervisor(hypervisor, find(document, &["hypervisor", hypervisor]), options);
    }
    check.section("agent", document.get("agent"), AGENT);
    check.section("runtime", document.get("runtime"), RUNTIME);
    let Check { draft, settings, files, problems, refused } = check;
    Checked { config: draft.finish(), settings, files, problems, refused }
}

/// What is wrong with the table of a `hypervisor` that is not chosen, by itself.
pub(crate) fn check_unused(document: &Table, hypervisor: &str, options: Option<&[LauncherOption]>) -> Vec<Problem> {
    let mut check = Check::default();
    check.hypervisor(hypervisor, find(document, &["hypervisor", hypervisor]), options);
    check.problems
}

/// A check under way.
#[derive(Default)]
struct Check {
    draft: Draft,
    settings: Vec<Setting>,
    files: Vec<NamedFile>,
    problems: Vec<Problem>,
    refused: Vec<Refused>,
}

impl Check {
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

    fn hypervisor(&mut self, name: &str, entry: Option<&Entry>, options: Option<&[LauncherOption]>) {
        let section = format!("hypervisor.{name}");
        let table = self.table(&section, entry);
        for key in HYPERVISOR {
            let default = options.and_then(|options| options.iter().find(|option| option.key == key.name)?.default());
            self.apply(&section, key, table.get(key.name), default);
        }
        let Some(options) = options else { return };
        let own: Vec<_> = options.iter().filter(|option| !is_key(HYPERVISOR, &option.key)).collect();
        let globs: Vec<_> =
            own.iter().filter(|option| option.is_path()).map(|option| valid_paths(&option.key)).collect();
        let mut written = toml::Table::new();
        for (key, entry) in table.iter().filter(|(key, _)| !is_key(HYPERVISOR, key)) {
            let name = format!("{section}.{key}");
            let value = entry.to_value();
            if let Some(option) = own.iter().find(|option| option.key == *key) {
                match option.examine(&value) {
                    Ok(()) => drop(written.insert(key.clone(), value)),
                    Err(text) => {
                        self.refused.push(Refused { problem: self.problems.len(), key: key.clone(), value });
                        self.wrong(entry, &name, text);
                    }
                }
            } else if globs.contains(key) {
                match read_globs(&value) {
                    Ok(()) => self.settings.push(Setting { key: name, value, origin: Some(entry.place.clone()) }),
                    Err(text) => self.wrong(entry, &name, text),
                }
            } else {
                let names = HYPERVISOR.iter().map(|key| key.name).chain(own.iter().map(|option| option.key.as_str()));
                self.unknown(&section, key, entry, names.chain(globs.iter().map(String::as_str)));
            }
        }
        for glob in globs.iter().filter(|glob| !table.contains_key(glob.as_str())) {
            let value = Value::Array(Vec::new());
            self.settings.push(Setting { key: format!("{section}.{glob}"), value, origin: None });
        }
        for option in own {
            let origin = table.get(&option.key).map(|entry| entry.place.clone());
            let Some(value) = written.get(&option.key).cloned().or_else(|| option.default()) else { continue };
            if option.is_path() {
                let wanted = if option.kind == "file" { Wanted::File } else { Wanted::Program };
                self.name_file(value.as_str().unwrap_or_default(), wanted);
            }
            self.settings.push(Setting { key: format!("{section}.{}", option.key), value, origin });
        }
        self.draft.config.options = written.to_string();
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
        let value = entry.map(Entry::to_value).or(backend).unwrap_or_else(|| key.default());
        let name = format!("{section}.{}", key.name);
        let place = entry.map(|entry| &entry.place);
        match self.set(key, &value) {
            Ok(()) => self.settings.push(Setting { key: name, value, origin: place.cloned() }),
            Err(text) => self.problems.push(Problem::of_key(place, name, text)),
        }
    }

    fn set(&mut self, key: &'static Key, value: &Value) -> Result<(), String> {
        let draft = &mut self.draft;
        match (&key.takes, value) {
            (Takes::Bool(set), Value::Boolean(value)) => set(draft, *value),
            (Takes::Integer(min, max, _, set), Value::Integer(value)) if (min..=max).contains(&value) => {
                set(draft, *value)
            }
            (Takes::Number(min, max, _, set), Value::Integer(_) | Value::Float(_)) if is_within(value, *min, *max) => {
                set(draft, to_float(value));
            }
            (Takes::Text(set), Value::String(text)) => set(draft, one_line(text)?),
            (Takes::Choice(words, set), Value::String(word)) if words.contains(&word.as_str()) => {
                set(draft, word.clone());
            }
            (Takes::File(set), Value::String(path)) => {
                set(draft, one_line(path)?);
                self.name_file(path, Wanted::File);
            }
            (Takes::Program(set), Value::String(path)) => {
                set(draft, one_line(path)?);
                self.name_file(path, Wanted::Program);
            }
            (Takes::Folder(set), Value::String(path)) if path.starts_with('/') => set(draft, one_line(path)?),
            (Takes::Texts(set), Value::Array(values)) => set(draft, texts(values)?),
            (Takes::Globs, Value::Array(_)) => read_globs(value)?,
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

    /// Of the setting that is told next.
    fn name_file(&mut self, path: &str, wanted: Wanted) {
        if !path.is_empty() {
            self.files.push(NamedFile { setting: self.settings.len(), path: path.into(), wanted });
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

fn is_key(keys: &[Key], name: &str) -> bool {
    keys.iter().any(|key| key.name == name)
}

fn is_within(value: &Value, min: f64, max: f64) -> bool {
    (min..=max).contains(&to_float(value))
}

fn to_float(value: &Value) -> f64 {
    value.as_float().or_else(|| value.as_integer().map(|number| number as f64)).unwrap_or(f64::NAN)
}

fn one_line(text: &str) -> Result<String, String> {
    if text.chars().any(char::is_control) {
        return Err(format!("found {}, expected a string without control characters", quote(text)));
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

fn read_globs(value: &Value) -> Result<(), String> {
    let Value::Array(values) = value else {
        return Err(format!("found {}, expected {}", describe(value), Takes::Globs));
    };
    for glob in texts(values)? {
        Pattern::new(&glob).map_err(|error| format!("{} is no glob: {}", quote(&glob), error.msg))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_accepted_by_its_own_key() {
        let mut check = Check::default();
        for key in HYPERVISOR.iter().chain(AGENT).chain(RUNTIME) {
            assert_eq!(check.set(key, &key.default()), Ok(()), "{}", key.name);
        }
    }
}
