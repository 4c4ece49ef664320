//! Which hypervisor a configuration chooses.

use toml::Value;

use crate::{
    document::{self, Content, Entry, Table},
    problem::{Place, Problem, describe, suggest},
};

/// Hypervisors that have launchers here; only used for suggestions. Any other name works when a launcher for it is
/// installed.
const KNOWN: [&str; 6] = ["qemu", "cloud-hypervisor", "firecracker", "builtin", "stratovirt", "acrn"];
/// Other names, with the canonical one.
const SYNONYMS: [(&str, &str); 3] = [("clh", "cloud-hypervisor"), ("fc", "firecracker"), ("dragonball", "builtin")];
/// Longest name, in bytes.
const MAX_NAME: usize = 32;

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
pub(crate) fn canonical(name: &str) -> &str {
    SYNONYMS.iter().find(|(synonym, _)| *synonym == name).map_or(name, |(_, canonical)| canonical)
}

/// What follows a name that no launcher has.
pub(crate) fn suggestion(name: &str) -> String {
    suggest(name, KNOWN)
}

/// Gives the tables below `[hypervisor]` their canonical names, so that a drop-in may use the other one.
pub(crate) fn canonicalise(table: &mut Table) -> Result<(), Vec<Problem>> {
    let Some(Entry { content: Content::Table(hypervisors), .. }) = table.get_mut("hypervisor") else { return Ok(()) };
    for (synonym, canonical) in SYNONYMS {
        let Some(entry) = hypervisors.remove(synonym) else { continue };
        if let Some(other) = hypervisors.get(canonical) {
            let text = format!("is another name of {canonical}, which stands at {}; join the two tables", other.place);
            return Err(vec![Problem::of_key(Some(&entry.place), format!("hypervisor.{synonym}"), text)]);
        }
        document::merge(hypervisors, [(canonical.to_owned(), entry)].into());
    }
    Ok(())
}

/// What `[runtime] hypervisor` says unless that is "", or else the only table below `[hypervisor]`.
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
        let text = format!("{} is not the name of a hypervisor{}", crate::problem::quote(name), suggestion(name));
        return Err(Problem::of_key(Some(&entry.place), key, text));
    }
    Ok(Hypervisor { name: name.to_owned(), place: entry.place.clone(), key })
}

fn named(document: &Table) -> Option<&Entry> {
    let Content::Table(runtime) = &document.get("runtime")?.content else { return None };
    runtime.get("hypervisor").filter(|entry| entry.to_value().as_str() != Some(""))
}

fn only(document: &Table) -> Result<(String, &Entry, &str), Problem> {
    let hypervisors = match document.get("hypervisor").map(|entry| &entry.content) {
        Some(Content::Table(hypervisors)) => hypervisors,
        // `check` reports the wrong type.
        Some(Content::Plain(_)) | None => {
            return Err(Problem::general("no hypervisor is chosen; add a table [hypervisor.qemu]"));
        }
    };
    let mut entries = hypervisors.iter();
    match (entries.next(), entries.next()) {
        (Some((name, entry)), None) => Ok((format!("hypervisor.{name}"), entry, name)),
        (None, _) => Err(Problem::general("no hypervisor is chosen; add a table [hypervisor.qemu]")),
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
