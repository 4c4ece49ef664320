//! A backend's own options: a TOML table, read into the backend's serde type, and described for others as JSON.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{Error, Result};

/// One key for people and for the config-service.
#[derive(Clone, Debug)]
pub struct OptionDoc {
    /// As in the TOML table.
    pub key: &'static str,
    /// `string`, `bool`, `integer`, `array`, or for what has to exist on the host `file` or `program`.
    pub kind: &'static str,
    /// The values that are accepted, where they can be counted; of an integer, the least and the greatest.
    pub accepted: &'static [&'static str],
    /// One sentence.
    pub doc: &'static str,
}

/// Reads the table `text`.
///
/// # Errors
/// When it is not TOML, has an unknown key or a value that is not accepted; the message names what is.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
    toml::from_str(text)
        .map_err(|error| Error::Invalid(format!("hypervisor options: {}", one_line(&error.to_string()))))
}

/// The JSON array that `options` prints: each key with its default from `T` itself.
pub fn describe<T: Serialize + Default>(docs: &[OptionDoc]) -> Value {
    let defaults = serde_json::to_value(T::default()).unwrap_or_default();
    let describe = |doc: &OptionDoc| {
        let mut told = json!({ "key": doc.key, "type": doc.kind, "default": defaults[doc.key], "doc": doc.doc });
        match (doc.kind, doc.accepted) {
            (_, []) => {}
            ("integer", [least, greatest]) => {
                told["minimum"] = json!(least.parse::<i64>().ok());
                told["maximum"] = json!(greatest.parse::<i64>().ok());
            }
            (_, words) => told["accepted"] = json!(words),
        }
        told
    };
    docs.iter().map(describe).collect()
}

/// `described`, and other defaults for keys that every hypervisor has.
pub fn with_defaults(mut described: Value, defaults: &[(&str, Value)]) -> Value {
    if let Value::Array(options) = &mut described {
        options.extend(defaults.iter().map(|(key, default)| json!({ "key": key, "default": default })));
    }
    described
}

/// toml draws the place over several lines; the last has the reason, the first the place.
fn one_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let place = lines.next().unwrap_or_default();
    let drawing = |line: &&str| line.starts_with('|') || line.starts_with(|first: char| first.is_ascii_digit());
    match lines.rfind(|line| !drawing(line)) {
        Some(reason) => format!("{reason} ({place})"),
        None => place.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize, Serialize)]
    #[serde(deny_unknown_fields, default)]
    struct Options {
        color: Color,
    }

    #[derive(Debug, Default, Deserialize, Serialize)]
    #[serde(rename_all = "lowercase")]
    enum Color {
        #[default]
        Red,
        Green,
    }

    #[test]
    fn an_unknown_key_is_named_with_the_known_ones() {
        let error = parse::<Options>("colour = \"red\"").unwrap_err().to_string();
        assert!(error.contains("unknown field `colour`") && error.contains("`color`"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn an_unknown_value_is_named_with_the_accepted_ones() {
        let error = parse::<Options>("color = \"blue\"").unwrap_err().to_string();
        assert!(error.contains("unknown variant `blue`, expected `red` or `green`"), "{error}");
    }

    #[test]
    fn an_integer_tells_its_bounds() {
        let doc = OptionDoc { key: "slots", kind: "integer", accepted: &["0", "255"], doc: "Its slots." };
        let told = &describe::<Options>(&[doc])[0];
        assert_eq!((&told["minimum"], &told["maximum"], &told["accepted"]), (&json!(0), &json!(255), &Value::Null));
    }

    #[test]
    fn the_default_comes_from_the_type() {
        let doc = OptionDoc { key: "color", kind: "string", accepted: &["red", "green"], doc: "Its color." };
        assert_eq!(describe::<Options>(&[doc])[0]["default"], "red");
    }
}
