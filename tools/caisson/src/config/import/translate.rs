//! Applies the rules: from Kata's settings to our text, and what became of each.

use std::{collections::BTreeSet, path::Path};

use caisson_config_service::defaults;
use serde::Serialize;
use toml::{Table, Value};

use super::{
    agent::{self, AGENT},
    hypervisor::{self, HYPERVISOR},
    kata::{Kata, Setting},
    rule::{Becomes, Rule},
    runtime::{self, RUNTIME},
};

/// The names of all keys that our configuration may have.
#[derive(Debug)]
pub(super) struct KnownKeys {
    pub(super) hypervisor: BTreeSet<String>,
    pub(super) agent: BTreeSet<String>,
    pub(super) runtime: BTreeSet<String>,
    /// The default kernel of the hypervisor, which boots it.
    pub(super) kernel: String,
}

/// Our configuration, and how it came about.
pub(super) struct Translation {
    pub(super) text: String,
    /// One for each of Kata's keys.
    pub(super) entries: Vec<Entry>,
    pub(super) notes: Vec<String>,
}

/// What became of one of Kata's keys.
#[derive(Debug, Serialize)]
pub(super) struct Entry {
    /// `hypervisor.qemu.path`
    pub(super) key: String,
    pub(super) value: Value,
    #[serde(flatten)]
    pub(super) fate: Fate,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(tag = "fate", rename_all = "snake_case")]
pub(super) enum Fate {
    /// With its name and its value.
    CarriedOver,
    /// With another name or another value.
    Renamed {
        becomes: String,
        new_value: Value,
    },
    /// It says what caisson does without it: off, empty, zero.
    Off,
    NoEquivalent {
        reason: String,
    },
}

/// Our configuration for `kata`, with keys out of `known` only, and with the guest that image-builder has put below
/// `prefix`: Kata's does not fit.
pub(super) fn translate(kata: &Kata, known: &KnownKeys, prefix: &Path) -> Translation {
    let theirs = kata.hypervisor.as_deref();
    let ours = theirs.and_then(hypervisor::ours);
    let mut written = Written::default();
    let judge = |setting: &Setting, written: &mut Written| match Section::of(setting, theirs) {
        Section::Hypervisor(name) if ours.is_none() => no_unless_off(setting, hypervisor::why_not(name)),
        Section::Hypervisor(_) => {
            by_rule(HYPERVISOR, setting, &known.hypervisor, &mut written.hypervisor, &mut written.runtime)
        }
        Section::Agent => by_rule(AGENT, setting, &known.agent, &mut written.agent, &mut written.runtime),
        Section::Runtime => {
            let mut same = Table::new();
            by_rule(RUNTIME, setting, &known.runtime, &mut same, &mut written.runtime)
        }
        Section::Nowhere(reason) => no_unless_off(setting, reason),
    };
    let mut entries = Vec::new();
    for setting in &kata.settings {
        let fate = judge(setting, &mut written);
        entries.push(Entry { key: setting.name(), value: setting.value.clone(), fate });
    }
    if ours.is_some() {
        for (key, file) in [("kernel", known.kernel.as_str()), ("initrd", defaults::INITRD)] {
            written.hypervisor.insert(key.into(), defaults::below(prefix, file).display().to_string().into());
        }
    }
    let why = theirs.map_or("there was none", hypervisor::why_not);
    let notes = match ours {
        Some(_) => Vec::new(),
        None => vec![format!("no hypervisor is chosen ({why}): add a table, [hypervisor.qemu] for example")],
    };
    Translation { text: written.text(kata, ours), entries, notes }
}

/// Our tables.
#[derive(Default)]
struct Written {
    hypervisor: Table,
    agent: Table,
    runtime: Table,
}

impl Written {
    fn text(&self, kata: &Kata, hypervisor: Option<&str>) -> String {
        let mut text = format!("# caisson's configuration, made of Kata Containers' {}.\n", kata.file.display());
        let hypervisor = hypervisor.map(|name| (format!("hypervisor.{name}"), &self.hypervisor));
        let others = [("agent".to_owned(), &self.agent), ("runtime".to_owned(), &self.runtime)];
        for (name, table) in hypervisor.into_iter().chain(others.into_iter().filter(|(_, table)| !table.is_empty())) {
            text.push_str(&format!("\n[{name}]\n"));
            for (key, value) in table {
                text.push_str(&format!("{key} = {value}\n"));
            }
        }
        text
    }
}

/// Whose rules apply.
enum Section<'a> {
    /// Kata's name.
    Hypervisor(&'a str),
    Agent,
    Runtime,
    Nowhere(&'static str),
}

impl<'a> Section<'a> {
    fn of(setting: &'a Setting, in_force: Option<&str>) -> Self {
        let mut names = setting.section.splitn(3, '.');
        match (names.next().unwrap_or_default(), names.next(), names.next()) {
            ("hypervisor", Some(name), _) if Some(name) != in_force => {
                Self::Nowhere("this hypervisor is not the one in force")
            }
            ("hypervisor", Some(name), None) => Self::Hypervisor(name),
            ("hypervisor", Some(_), Some(inner)) => {
                Self::Nowhere(hypervisor::inner_table_without_equivalent(inner).unwrap_or(UNKNOWN))
            }
            ("agent", _, None) => Self::Agent,
            ("agent", ..) => Self::Nowhere(agent::is_mem_agent(&setting.section).unwrap_or(UNKNOWN)),
            ("runtime", None, _) => Self::Runtime,
            _ => Self::Nowhere(runtime::section_without_equivalent(&setting.section).unwrap_or(UNKNOWN)),
        }
    }
}

const UNKNOWN: &str = "neither caisson nor a Kata Containers that it knows has this key";

fn by_rule(rules: &[Rule], setting: &Setting, known: &BTreeSet<String>, same: &mut Table, runtime: &mut Table) -> Fate {
    let Some(rule) = rules.iter().find(|rule| rule.key == setting.key) else {
        return no_unless_off(setting, UNKNOWN);
    };
    let mut keep_name = |value: Value| {
        same.insert(rule.key.to_owned(), value.clone());
        if value == setting.value {
            Fate::CarriedOver
        } else {
            Fate::Renamed { becomes: rule.key.to_owned(), new_value: value }
        }
    };
    match rule.becomes {
        // A path that says "" in Kata's file says "the default" in ours too.
        Becomes::Same | Becomes::SameWith(_) | Becomes::Runtime(..) if setting.value.as_str() == Some("") => Fate::Off,
        Becomes::Same | Becomes::SameWith(_) if !known.contains(rule.key) => no_unless_off(setting, rule.otherwise),
        Becomes::Same => keep_name(setting.value.clone()),
        Becomes::SameWith(convert) => match convert(&setting.value, known) {
            Ok(value) => keep_name(value),
            Err(reason) => no(&reason),
        },
        Becomes::Runtime(..) if setting.value.as_bool() == Some(false) => Fate::Off,
        Becomes::Runtime(key, convert) => match convert(&setting.value, known) {
            Ok(value) => becomes_runtime(key, value, runtime),
            Err(reason) => no(&reason),
        },
        Becomes::Nothing => no_unless_off(setting, rule.otherwise),
        Becomes::NothingEvenOff => no(rule.otherwise),
    }
}

/// Where several of Kata's keys become one of ours, the one that asks for more counts.
fn becomes_runtime(key: &str, value: Value, runtime: &mut Table) -> Fate {
    let new_value = match runtime.get(key) {
        Some(present) if more(present, &value) => present.clone(),
        _ => value,
    };
    runtime.insert(key.to_owned(), new_value.clone());
    Fate::Renamed { becomes: format!("runtime.{key}"), new_value }
}

/// Whether `a` is longer, or more talkative, than `b`.
fn more(a: &Value, b: &Value) -> bool {
    let level =
        |value: &Value| ["error", "warn", "info", "debug", "trace"].iter().position(|l| Some(*l) == value.as_str());
    (a.as_integer(), level(a)) > (b.as_integer(), level(b))
}

fn no(reason: &str) -> Fate {
    Fate::NoEquivalent { reason: reason.to_owned() }
}

fn no_unless_off(setting: &Setting, reason: &str) -> Fate {
    if is_off(&setting.value) { Fate::Off } else { no(reason) }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Boolean(on) => !on,
        Value::Integer(number) => *number == 0,
        Value::Float(number) => *number == 0.0,
        Value::String(text) => text.is_empty() || text == "no-port",
        Value::Array(values) => values.is_empty(),
        Value::Datetime(_) | Value::Table(_) => false,
    }
}
