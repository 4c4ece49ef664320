//! What a pod's annotations change: which of them are for us, which are allowed, and how they are laid over the files.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Component, Path, PathBuf},
};

use glob::{MatchOptions, Pattern};
use toml::Value;

use crate::{
    document::{self, Table, find},
    keys::{AGENT, ENABLE_ANNOTATIONS, HYPERVISOR, Key, RUNTIME, Takes, valid_paths},
    launchers::LauncherOption,
    problem::{Place, Problem, quote, suggest},
};

/// Ours, then Kata Containers', which means the same.
const PREFIXES: [&str; 2] = ["io.caisson.config.", "io.katacontainers.config."];
const SECTIONS: [&str; 3] = ["hypervisor", "agent", "runtime"];
/// Where an annotation of Kata Containers has another name than the key: section, annotation, key.
const RENAMED: [(&str, &str, &str); 2] =
    [("hypervisor", "default_max_vcpus", "default_maxvcpus"), ("runtime", "hypervisor_name", "hypervisor")];
/// Longest value that is read, in bytes.
const MAX_VALUE: usize = 16 << 10;

/// What one annotation asks for.
#[derive(Debug, PartialEq)]
pub(crate) struct Wish {
    /// The annotation.
    pub(crate) place: Place,
    /// One of the tables of a configuration.
    pub(crate) section: &'static str,
    /// A key of that table.
    pub(crate) key: String,
    text: String,
}

/// What all annotations that are for us ask for.
///
/// # Errors
/// Those that make no sense, whatever the configuration is.
pub(crate) fn wishes(annotations: &HashMap<String, String>) -> Result<Vec<Wish>, Vec<Problem>> {
    let (mut wishes, mut problems) = (BTreeMap::<_, Wish>::new(), Vec::new());
    let mut names: Vec<_> = annotations.iter().collect();
    names.sort();
    for (name, text) in names {
        let Some(path) = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)) else { continue };
        let place = Place::Annotation(name.as_str().into());
        let (section, key) = path.split_once('.').unwrap_or((path, ""));
        let Some(section) = SECTIONS.into_iter().find(|known| *known == section) else {
            problems
                .push(Problem::at(place, format!("unknown table {}{}", quote(section), suggest(section, SECTIONS))));
            continue;
        };
        if text.len() > MAX_VALUE {
            problems.push(Problem::at(place, format!("longer than {} KiB", MAX_VALUE >> 10)));
            continue;
        }
        let renamed = RENAMED.iter().find(|(of, theirs, _)| (*of, *theirs) == (section, key));
        let key = renamed.map_or(key, |(.., ours)| ours);
        let wish = Wish { place, section, key: key.to_owned(), text: text.clone() };
        match wishes.get(&(section, key)) {
            Some(other) if other.text != wish.text => {
                let text = format!("found {}, but {} says {}", quote(text), other.place, quote(&other.text));
                problems.push(Problem::at(wish.place, text));
            }
            _ => drop(wishes.insert((section, key), wish)),
        }
    }
    if problems.is_empty() { Ok(wishes.into_values().collect()) } else { Err(problems) }
}

/// Lays `wishes` over `document`, as far as the table of `hypervisor` allows them; `options` are its launcher's. Answers
/// each that is not allowed, with what to change where.
pub(crate) fn lay_over<'a>(
    document: &mut Table,
    hypervisor: &str,
    options: &[LauncherOption],
    wishes: impl Iterator<Item = &'a Wish>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    for wish in wishes {
        match wish.check(document, hypervisor, options) {
            Ok(form) => {
                let path = match wish.section {
                    "hypervisor" => vec!["hypervisor", hypervisor, &wish.key],
                    section => vec![section, &wish.key],
                };
                let value = wish.value(form, find(document, &path).map(document::Entry::to_value));
                document::merge(document, document::single(&path, value, &wish.place));
            }
            Err(text) => problems.push(Problem::at(wish.place.clone(), text)),
        }
    }
    problems
}

/// Whether `glob`, of `enable_annotations`, allows the key `name`. No star stands for a dot.
pub(crate) fn allows(glob: &str, name: &str) -> bool {
    matches(&glob.replace('.', "/"), &name.replace('.', "/"))
}

/// Whether `glob` matches all of `path`. No star stands for a slash.
fn matches(glob: &str, path: &str) -> bool {
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
    Pattern::new(glob).is_ok_and(|glob| glob.matches_with(path, options))
}

/// How an annotation's text becomes a value.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Bool,
    Number,
    Text,
    Array,
    Path,
}

impl Wish {
    fn check(&self, document: &Table, hypervisor: &str, options: &[LauncherOption]) -> Result<Form, String> {
        let form = self.form(options)?;
        let allowed_name = match self.section {
            "hypervisor" => self.key.clone(),
            section => format!("{section}.{}", self.key),
        };
        let list = |key: &str| globs(document, hypervisor, key);
        if !list(ENABLE_ANNOTATIONS).iter().any(|glob| allows(glob, &allowed_name)) {
            let remedy = remedy(document, hypervisor, ENABLE_ANNOTATIONS, &quote(&allowed_name));
            return Err(format!("not allowed; {remedy}"));
        }
        let valid = valid_paths(&self.key);
        if form == Form::Path && !(is_plain(&self.text) && list(&valid).iter().any(|glob| matches(glob, &self.text))) {
            let remedy = remedy(document, hypervisor, &valid, "a glob of such paths");
            return Err(format!("{} is not allowed; {remedy}", quote(&self.text)));
        }
        Ok(form)
    }

    fn form(&self, options: &[LauncherOption]) -> Result<Form, String> {
        let keys = match self.section {
            "hypervisor" => HYPERVISOR,
            "agent" => AGENT,
            _ => RUNTIME,
        };
        let options = if self.section == "hypervisor" { options } else { &[] };
        if let Some(key) = keys.iter().find(|key| key.name == self.key) {
            return form_of(key);
        }
        if let Some(option) = options.iter().find(|option| option.key == self.key) {
            return Ok(match option.kind.as_str() {
                "bool" => Form::Bool,
                "integer" | "float" => Form::Number,
                "array" => Form::Array,
                "file" | "program" => Form::Path,
                _ => Form::Text,
            });
        }
        let known = keys.iter().filter(|key| form_of(key).is_ok()).map(|key| key.name);
        let known = known.chain(options.iter().map(|option| option.key.as_str()));
        Err(format!("unknown key {}{}", quote(&self.key), suggest(&self.key, known)))
    }

    /// Text that is not of the right form stays text, so that the key itself refuses it.
    fn value(&self, form: Form, below: Option<Value>) -> Value {
        let read = match form {
            Form::Bool => self.text.parse().map(Value::Boolean).ok(),
            Form::Number => self.text.parse().map(Value::Integer).or_else(|_| self.text.parse().map(Value::Float)).ok(),
            Form::Array => self.text.parse::<Value>().ok().filter(Value::is_array),
            // What the administrator wrote stays in force.
            Form::Text if self.key == "kernel_params" => {
                let below = below.as_ref().and_then(Value::as_str).unwrap_or_default();
                Some(format!("{below} {}", self.text).trim().into())
            }
            Form::Text | Form::Path => None,
        };
        read.unwrap_or_else(|| self.text.as_str().into())
    }
}

fn form_of(key: &Key) -> Result<Form, String> {
    match key.takes {
        Takes::Bool(_) => Ok(Form::Bool),
        Takes::Integer(..) | Takes::Number(..) => Ok(Form::Number),
        Takes::Text(_) | Takes::Choice(..) => Ok(Form::Text),
        Takes::Texts(_) => Ok(Form::Array),
        Takes::File(_) | Takes::Program(_) => Ok(Form::Path),
        // What concerns the host, or other pods.
        Takes::Folder(_) | Takes::Globs => Err("only a file may say this".to_owned()),
    }
}

fn globs(document: &Table, hypervisor: &str, key: &str) -> Vec<String> {
    let value = find(document, &["hypervisor", hypervisor, key]).map(document::Entry::to_value);
    let globs = value.as_ref().and_then(Value::as_array).into_iter().flatten();
    globs.filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Where to write `element`, so that the annotation is allowed.
fn remedy(document: &Table, hypervisor: &str, key: &str, element: &str) -> String {
    if let Some(list) = find(document, &["hypervisor", hypervisor, key]) {
        return format!("add {element} to {key} at {}", list.place.line());
    }
    match find(document, &["hypervisor", hypervisor]) {
        Some(table) => format!("add {key} with {element} to [hypervisor.{hypervisor}] at {}", table.place.line()),
        None => format!("add a table [hypervisor.{hypervisor}] with {key}, and {element} in it"),
    }
}

/// Whether a path leads nowhere but where its text says.
fn is_plain(path: &str) -> bool {
    let parts = Path::new(path).components();
    let plain = parts.clone().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    // Doubled slashes and single dots do not come back.
    path.starts_with('/') && plain && parts.collect::<PathBuf>().as_os_str() == path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_glob_is_anchored_at_both_ends() {
        assert!(allows("default_*", "default_memory"));
        assert!(!allows("path", "jailer_path") && !allows("path", "path_x"));
    }

    #[test]
    fn a_star_stays_in_its_table_and_its_folder() {
        assert!(!allows("*", "agent.debug_console_enabled") && allows("agent.*", "agent.debug_console_enabled"));
        assert!(matches("/srv/*/vmlinux", "/srv/a/vmlinux") && !matches("/srv/*", "/srv/a/vmlinux"));
    }

    #[test]
    fn a_path_with_a_way_out_is_not_plain() {
        assert!(is_plain("/srv/kernels/vmlinux"));
        for path in ["/srv/../etc/shadow", "srv/vmlinux", "/srv//vmlinux", "/srv/./vmlinux", ""] {
            assert!(!is_plain(path), "{path}");
        }
    }
}
