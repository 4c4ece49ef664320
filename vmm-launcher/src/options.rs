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

/// A value that goes only with another key's value.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// The key that has this [`Self::value`].
    pub key: &'static str,
    /// A word that it accepts.
    pub value: &'static str,
    /// The other key.
    pub needs: &'static str,
    /// What the other key has to have, as TOML.
    pub needed: &'static str,
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

/// `described`, and what goes only with what.
pub fn with_needs(mut described: Value, needs: &[Need]) -> Value {
    for need in needs {
        let options = described.as_array_mut().into_iter().flatten();
        for option in options.filter(|option| option["key"] == need.key) {
            let needed = serde_json::from_str(need.needed).unwrap_or_else(|_| need.needed.into());
            option["needs"][need.value][need.needs] = needed;
        }
    }
    described
}

/// What of `docs` is not what `T` reads: keys that differ, accepted values that are refused, defaults that are none.
/// Empty, as a backend's test expects.
pub fn discrepancies<T: Serialize + DeserializeOwned + Default>(docs: &[OptionDoc]) -> Vec<String> {
    let defaults = serde_json::to_value(T::default()).unwrap_or_default();
    let mut found = Vec::new();
    for key in defaults.as_object().into_iter().flat_map(|defaults| defaults.keys()) {
        if !docs.iter().any(|doc| doc.key == key) {
            found.push(format!("{key} is read and not documented"));
        }
    }
    let try_out = |text: String| parse::<T>(&text).err().map(|error| format!("{text}: {error}"));
    for doc in docs {
        let quote = if doc.kind == "integer" { "" } else { "\"" };
        let accepted = doc.accepted.iter().map(|value| format!("{} = {quote}{value}{quote}", doc.key));
        found.extend(accepted.filter_map(try_out));
        found.extend(try_out(format!("{} = {}", doc.key, defaults[doc.key])));
    }
    found
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
    fn what_goes_only_with_what_is_told() {
        let doc = OptionDoc { key: "color", kind: "string", accepted: &["red", "green"], doc: "Its color." };
        let need = Need { key: "color", value: "green", needs: "paint", needed: "true" };
        let told = with_needs(describe::<Options>(&[doc]), &[need]);
        assert_eq!(told[0]["needs"], json!({ "green": { "paint": true } }));
    }

    #[test]
    fn documentation_that_differs_from_what_is_read_is_told() {
        let doc = OptionDoc { key: "colour", kind: "string", accepted: &["red"], doc: "Its color." };
        let found = discrepancies::<Options>(&[doc]);
        assert_eq!(found[0], "color is read and not documented");
        assert!(found[1].starts_with("colour = \"red\": ") && found[2].starts_with("colour = null: "), "{found:?}");
    }

    #[test]
    fn the_default_comes_from_the_type() {
        let doc = OptionDoc { key: "color", kind: "string", accepted: &["red", "green"], doc: "Its color." };
        assert_eq!(describe::<Options>(&[doc])[0]["default"], "red");
    }
}
