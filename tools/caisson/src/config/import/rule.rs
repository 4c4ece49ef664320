//! How the tables in this folder say what becomes of a key.

use std::collections::BTreeSet;

use toml::Value;

/// What becomes of one of Kata Containers' keys.
pub(super) struct Rule {
    /// Kata's name, without its section.
    pub(super) key: &'static str,
    pub(super) becomes: Becomes,
    /// Why there is no equivalent, where there is none.
    pub(super) otherwise: &'static str,
}

pub(super) enum Becomes {
    /// The same key of the same section, if caisson has it.
    Same,
    /// The same key of the same section with another value.
    SameWith(Convert),
    /// This key of our `[runtime]`.
    Runtime(&'static str, Convert),
    /// Nothing.
    Nothing,
    /// Nothing, and what is off there is not so here.
    NothingEvenOff,
}

/// Our value for Kata's, or why there is none; the names are those of the keys that our table may have.
pub(super) type Convert = fn(&Value, &BTreeSet<String>) -> Result<Value, String>;

/// The same key, where caisson has it; `otherwise` says why not.
pub(super) const fn same(key: &'static str, otherwise: &'static str) -> Rule {
    Rule { key, becomes: Becomes::Same, otherwise }
}

/// The same key with another value.
pub(super) const fn same_with(key: &'static str, convert: Convert, otherwise: &'static str) -> Rule {
    Rule { key, becomes: Becomes::SameWith(convert), otherwise }
}

/// A key of our `[runtime]`.
pub(super) const fn runtime(key: &'static str, ours: &'static str, convert: Convert) -> Rule {
    Rule { key, becomes: Becomes::Runtime(ours, convert), otherwise: "" }
}

/// No equivalent.
pub(super) const fn nothing(key: &'static str, why: &'static str) -> Rule {
    Rule { key, becomes: Becomes::Nothing, otherwise: why }
}
