//! Which hypervisors there are, and which of them a configuration chooses.

use toml::Value;

use crate::{
    document::{self, Content, Entry, Table},
    problem::{Place, Problem, describe, quote, suggest},
};

/// A hypervisor that has a launcher here. Any other name works too, when a launcher for it is installed.
#[derive(Debug)]
pub struct Known {
    /// As in the launcher's name, and in every answer.
    pub name: &'static str,
    /// The other name that tables and requests may use.
    pub synonym: Option<&'static str>,
    /// For people.
    pub title: &'static str,
}

/// All of them.
pub const KNOWN: [Known; 6] = [
    Known { name: "qemu", synonym: None, title: "QEMU" },
    Known { name: "cloud-hypervisor", synonym: Some("clh"), title: "Cloud Hypervisor" },
    Known { name: "firecracker", synonym: Some("fc"), title: "Firecracker" },
    Known { name: "builtin", synonym: Some("dragonball"), title: "the built-in VMM" },
    Known { name: "stratovirt", synonym: None, title: "StratoVirt" },
    Known { name: "acrn", synonym: None, title: "ACRN" },
];

/// Longest name, in bytes.
const MAX_NAME: usize = 32;
const NONE_CHOSEN: &str = "no hypervisor is chosen; add a table [hypervisor.qemu]";

/// The hypervisor that runs the sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hypervisor {
    /// Canonical.
    pub(crate) name: String,
    /// Where it is chosen.
    pub(crate) place: Place,
    /// The key that chooses it.
    pub(crate) key: String,
}

/// The name that launchers, messages and `SandboxConfig` use.
pub fn canonical(name: &str) -> &str {
    KNOWN.iter().find(|known| known.synonym == Some(name)).map_or(name, |known| known.name)
}

/// Whether the canonical `name` is one of [`KNOWN`].
pub(crate) fn is_known(name: &str) -> bool {
    KNOWN.iter().any(|known| known.name == name)
}

/// What follows a name that no launcher has.
pub(crate) fn suggestion(name: &str) -> String {
    suggest(name, KNOWN.iter().map(|known| known.name))
}

/// Gives the tables below `[hypervisor]` their canonical names, so that a drop-in may use the other one.
pub(crate) fn canonicalise(table: &mut Table) -> Result<(), Vec<Problem>> {
    let Some(Entry { content: Content::Table(hypervisors), .. }) = table.get_mut("hypervisor") else { return Ok(()) };
    for Known { name, synonym, .. } in KNOWN {
        let Some((synonym, entry)) = synonym.and_then(|synonym| hypervisors.remove_entry(synonym)) else { continue };
        if let Some(other) = hypervisors.get(name) {
            let text = format!("is another name of {name}, which stands at {}; join the two tables", other.place);
            return Err(vec![Problem::of_key(Some(&entry.place), format!("hypervisor.{synonym}"), text)]);
        }
        document::merge(hypervisors, [(name.to_owned(), entry)].into());
    }
    Ok(())
}

/// What `[runtime] hypervisor` says unless that is "", or else the only table below `[hypervisor]`: of the
/// configuration itself, so that a drop-in may keep settings for several, or of all files.
pub(crate) fn choose(document: &Table) -> Result<Hypervisor, Problem> {
    let (key, entry, name) = match named(document) {
        Some(entry) => match &entry.content {
            Content::Plain(Value::String(name)) => ("runtime.hypervisor".to_owned(), entry, canonical(name)),
            _ => {
                // In the words of `check`, which finds it too.
                let text = format!("found {}, expected a string", describe(&entry.to_value()));
                return Err(Problem::of_key(Some(&entry.place), "runtime.hypervisor", text));
            }
        },
        None => only(document)?,
    };
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_name_byte) {
        let text = format!("{} is not the name of a hypervisor{}", quote(name), suggestion(name));
        return Err(Problem::of_key(Some(&entry.place), key, text));
    }
    Ok(Hypervisor { name: name.to_owned(), place: entry.place.clone(), key })
}

/// The tables of hypervisors that are not `chosen`.
pub(crate) fn others(document: &Table, chosen: &str) -> Vec<Hypervisor> {
    let Some(hypervisors) = tables(document) else { return Vec::new() };
    hypervisors
        .iter()
        .filter(|(name, _)| *name != chosen)
        .map(|(name, entry)| Hypervisor {
            name: name.clone(),
            place: entry.place.clone(),
            key: format!("hypervisor.{name}"),
        })
        .collect()
}

fn named(document: &Table) -> Option<&Entry> {
    document::find(document, &["runtime", "hypervisor"]).filter(|entry| entry.to_value().as_str() != Some(""))
}

fn tables(document: &Table) -> Option<&Table> {
    match &document.get("hypervisor")?.content {
        Content::Table(hypervisors) => Some(hypervisors),
        // `check` reports the wrong type.
        Content::Plain(_) => None,
    }
}

fn only(document: &Table) -> Result<(String, &Entry, &str), Problem> {
    let Some(hypervisors) = tables(document) else { return Err(Problem::general(NONE_CHOSEN)) };
    let chosen = |(name, entry)| (format!("hypervisor.{name}"), entry, String::as_str(name));
    let of_the_file: Vec<_> = hypervisors.iter().filter(|(_, entry)| entry.place.layer() == 0).collect();
    if let [only] = of_the_file[..] {
        return Ok(chosen(only));
    }
    let mut entries = hypervisors.iter();
    match (entries.next(), entries.next()) {
        (Some(only), None) => Ok(chosen(only)),
        (None, _) => Err(Problem::general(NONE_CHOSEN)),
        (Some((_, first)), Some(_)) => {
            let names: Vec<_> = hypervisors.keys().map(String::as_str).collect();
            let text = format!("there are tables for {}; choose with [runtime] hypervisor", names.join(", "));
            Err(Problem::of_key(Some(&first.place), "hypervisor", text))
        }
    }
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'
}
