//! Identifiers that containerd chooses, parsed once at the edge.

use std::fmt;

/// containerd's limit, `pkg/identifiers/validate.go`.
const MAX_LENGTH: usize = 76;

/// containerd's identifier of a namespace, container or exec: at most 76 bytes, `[A-Za-z0-9]+` joined by single
/// `.`, `_` or `-`. Safe as a path component.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(String);

/// Why a text is not an identifier.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} \"{}\" is not an identifier: at most {MAX_LENGTH} letters and digits, joined by single '.', '_' or '-'", .text.escape_debug())]
pub struct InvalidId {
    /// What the text was meant to name.
    pub what: &'static str,
    /// The text as it came.
    pub text: String,
}

impl Id {
    /// Checks `text`; `what` names it in the error: "container id", "exec id", "namespace".
    ///
    /// # Errors
    /// When `text` breaks containerd's rule.
    pub fn parse(what: &'static str, text: &str) -> Result<Self, InvalidId> {
        let well_formed = text.len() <= MAX_LENGTH
            && text
                .split(['.', '_', '-'])
                .all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        if well_formed {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId { what, text: text.chars().take(MAX_LENGTH + 1).collect() })
        }
    }

    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_digits_joined_by_separators_are_accepted() {
        assert_eq!(Id::parse("container id", "web-1.a_B").unwrap().as_str(), "web-1.a_B");
    }

    #[test]
    fn a_path_is_refused() {
        assert!(Id::parse("container id", "../etc").is_err());
        assert!(Id::parse("container id", "a/b").is_err());
        assert!(Id::parse("container id", "..").is_err());
    }

    #[test]
    fn empty_and_too_long_are_refused() {
        assert!(Id::parse("container id", "").is_err());
        assert!(Id::parse("container id", &"a".repeat(77)).is_err());
        assert!(Id::parse("container id", &"a".repeat(76)).is_ok());
    }

    #[test]
    fn the_error_names_what_was_meant_and_shows_control_characters_escaped() {
        let error = Id::parse("exec id", "a\nb").unwrap_err().to_string();
        assert!(error.starts_with("exec id \"a\\nb\" is not an identifier"), "{error}");
    }
}
