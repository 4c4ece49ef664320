//! What is wrong with a configuration, in words that let a person mend it.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// How many problems a message tells before it counts the rest.
const MAX_TOLD: usize = 100;
/// How much of a value a message repeats, in characters.
const MAX_QUOTED: usize = 80;
/// How much of a program's own words a message shows, in characters.
const MAX_REASON: usize = 1000;

/// Where something is written. Ordered as it takes effect.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In a file.
    File {
        /// 0 for the configuration itself, then one for each drop-in.
        layer: usize,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// The file.
        file: Arc<Path>,
    },
    /// In an annotation of the pod, by its whole name.
    Annotation(Arc<str>),
}

impl Place {
    /// Which of the files it is in; an annotation comes after all of them.
    pub(crate) fn layer(&self) -> usize {
        match self {
            Self::File { layer, .. } => *layer,
            Self::Annotation(_) => usize::MAX,
        }
    }

    /// The file and line, which is enough to find it.
    pub fn line(&self) -> String {
        match self {
            Self::File { line, file, .. } => format!("{}:{line}", file.display()),
            Self::Annotation(_) => self.to_string(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { line, column, file, .. } => write!(f, "{}:{line}:{column}", file.display()),
            Self::Annotation(name) => write!(f, "annotation {}", bounded(name, MAX_QUOTED)),
        }
    }
}

/// One thing that is wrong: `<file>:<line>:<column>: <key>: <what was found, and what is accepted>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    place: Option<Place>,
    key: String,
    text: String,
    passing: bool,
}

impl Problem {
    /// About a key that is written somewhere, or, without a place, about a default.
    pub fn of_key(place: Option<&Place>, key: impl Into<String>, text: impl Into<String>) -> Self {
        Self { place: place.cloned(), key: key.into(), text: text.into(), passing: false }
    }

    /// About something written that belongs to no key: a line that is no TOML, an annotation.
    pub fn at(place: Place, text: impl Into<String>) -> Self {
        Self { place: Some(place), key: String::new(), text: text.into(), passing: false }
    }

    /// About a whole file, or everything.
    pub fn general(text: impl Into<String>) -> Self {
        Self { place: None, key: String::new(), text: text.into(), passing: false }
    }

    /// Names the hypervisors that there would be instead.
    pub(crate) fn add_choices(&mut self, hypervisors: &[&str]) {
        if !hypervisors.is_empty() {
            self.text.push_str(&format!(", or use a hypervisor that can: {}", hypervisors.join(", ")));
        }
    }

    /// The same, said of something that may have passed at the next look, although no file has changed by then.
    pub(crate) fn passing(self) -> Self {
        Self { passing: true, ..self }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.text)
    }
}

/// Everything that is wrong with one configuration, in the order of its files. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    /// The configuration; none when it was not found.
    pub file: Option<PathBuf>,
    list: Vec<Problem>,
}

impl Problems {
    /// Puts `list`, which has at least one problem, in order, each once: first what is written, then what is not.
    pub(crate) fn of(file: Option<&Path>, mut list: Vec<Problem>) -> Self {
        list.sort_by(|a, b| (a.place.is_none(), a).cmp(&(b.place.is_none(), b)));
        list.dedup();
        Self { file: file.map(Path::to_owned), list }
    }

    /// The same, said of a pod's annotations rather than of the configuration.
    pub(crate) fn of_pod(self) -> Self {
        Self { file: None, ..self }
    }

    /// Each problem by itself; the last sentence counts those that are left out.
    pub fn sentences(&self) -> Vec<String> {
        let mut sentences: Vec<_> = self.list.iter().take(MAX_TOLD).map(ToString::to_string).collect();
        if let Some(more @ 1..) = self.list.len().checked_sub(MAX_TOLD) {
            sentences.push(format!("and {more} more"));
        }
        sentences
    }

    /// Whether a second look may find less, although no file has changed.
    pub(crate) fn may_pass(&self) -> bool {
        self.list.iter().any(|problem| problem.passing)
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self { file: None, list: vec![problem] }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(file) = &self.file else { return f.write_str(&self.sentences().join("; ")) };
        if let [problem] = &self.list[..] {
            return write!(f, "the configuration {} has a problem: {problem}", file.display());
        }
        write!(f, "the configuration {} has {} problems:", file.display(), self.list.len())?;
        for sentence in self.sentences() {
            write!(f, "\n  {sentence}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// `; did you mean "<the nearest>"?`, or what is accepted when nothing is near.
pub(crate) fn suggest<'a>(found: &str, accepted: impl IntoIterator<Item = &'a str>) -> String {
    let accepted: Vec<_> = accepted.into_iter().collect();
    match nearest(found, &accepted) {
        suggestion if !suggestion.is_empty() => suggestion,
        _ if accepted.is_empty() => String::new(),
        _ => format!("; accepted: {}", accepted.join(", ")),
    }
}

/// `; did you mean "<the nearest>"?`, or nothing.
pub(crate) fn nearest(found: &str, accepted: &[&str]) -> String {
    let near = accepted
        .iter()
        .map(|name| (strsim::damerau_levenshtein(found, name), name))
        .min()
        .filter(|(distance, name)| *distance <= (name.len() / 3).max(1));
    near.map_or_else(String::new, |(_, name)| format!("; did you mean \"{name}\"?"))
}

/// A value as a message shows it: `"two" (a string)`.
pub(crate) fn describe(value: &toml::Value) -> String {
    let kind = match value {
        toml::Value::String(text) => return format!("{} (a string)", quote(text)),
        toml::Value::Array(_) => return "an array".to_owned(),
        toml::Value::Table(_) => return "a table".to_owned(),
        toml::Value::Integer(_) => "an integer",
        toml::Value::Float(_) => "a float",
        toml::Value::Boolean(_) => "a boolean",
        toml::Value::Datetime(_) => "a date",
    };
    format!("{value} ({kind})")
}

/// A text as a message shows it: in quotes, on one line, and not too long.
pub(crate) fn quote(text: &str) -> String {
    format!("\"{}\"", bounded(text, MAX_QUOTED))
}

/// What a program said of its failure, as a message shows it: nothing of the reason may be missing.
pub(crate) fn quote_reason(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    format!("\"{}\"", bounded(&lines.join("; "), MAX_REASON))
}

/// A text on one line, and not too long.
fn bounded(text: &str, limit: usize) -> String {
    let mut shown = String::new();
    for character in text.chars().take(limit) {
        match character {
            // These marks are not ours.
            '\'' => shown.push('\''),
            character => shown.extend(character.escape_debug()),
        }
    }
    if text.chars().nth(limit).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_name_is_suggested_and_a_far_one_gets_the_list() {
        assert_eq!(suggest("kernal", ["image", "kernel"]), "; did you mean \"kernel\"?");
        assert_eq!(suggest("zebra", ["image", "kernel"]), "; accepted: image, kernel");
    }

    #[test]
    fn a_long_or_hostile_text_is_shown_short_and_escaped() {
        let shown = quote(&format!("a\n\x1b{}", "b".repeat(1000)));
        assert!(shown.starts_with("\"a\\n\\u{1b}bbb") && shown.ends_with("…\"") && shown.len() < 100, "{shown}");
    }

    #[test]
    fn more_problems_than_fit_are_counted() {
        let list = (0..103).map(|number| Problem::general(format!("{number:03}"))).collect();
        let sentences = Problems::of(None, list).sentences();
        assert_eq!(sentences.len(), 101);
        assert_eq!(sentences[100], "and 3 more");
    }
}
