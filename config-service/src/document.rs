//! A TOML document in which every value still knows where it is written, and how one document is laid over another.
//!
//! Meaning starts later, in `check`.

use std::{collections::BTreeMap, fmt::Display, path::Path, sync::Arc};

use toml::{
    Spanned, Value,
    de::{DeTable, DeValue},
};

use crate::problem::{Place, Problem, quote};

/// Keys and what is written for them.
pub(crate) type Table = BTreeMap<String, Entry>;

/// What is written for one key, and where the key stands.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) place: Place,
    pub(crate) content: Content,
}

/// Tables merge; everything else, arrays too, replaces.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    Table(Table),
    Plain(Value),
}

impl Entry {
    /// The value without its places.
    pub(crate) fn to_value(&self) -> Value {
        match &self.content {
            Content::Plain(value) => value.clone(),
            Content::Table(table) => {
                Value::Table(table.iter().map(|(key, entry)| (key.clone(), entry.to_value())).collect())
            }
        }
    }
}

/// What stands at `path`.
pub(crate) fn find<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Entry> {
    let (key, rest) = path.split_first()?;
    let entry = table.get(*key)?;
    match (rest, &entry.content) {
        ([], _) => Some(entry),
        (rest, Content::Table(table)) => find(table, rest),
        (_, Content::Plain(_)) => None,
    }
}

/// A document that says only that the key at `path` has `value`, as is written at `place`.
pub(crate) fn single(path: &[&str], value: Value, place: &Place) -> Table {
    let entry = |content| Entry { place: place.clone(), content };
    match path {
        [] => Table::new(),
        [key] => [((*key).to_owned(), entry(Content::Plain(value)))].into(),
        [table, rest @ ..] => [((*table).to_owned(), entry(Content::Table(single(rest, value, place))))].into(),
    }
}

/// Reads `text`, the content of `file`.
///
/// # Errors
/// Every syntax error, with its place.
pub(crate) fn parse(text: &str, layer: usize, file: &Path) -> Result<Table, Vec<Problem>> {
    let lines = Lines::of(text, layer, file);
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut problems: Vec<_> = errors.iter().map(|error| lines.problem(error)).collect();
    let table = lines.table(table.into_inner(), &mut problems);
    if problems.is_empty() { Ok(table) } else { Err(problems) }
}

/// Lays `over` over `base`.
pub(crate) fn merge(base: &mut Table, over: Table) {
    for (key, entry) in over {
        if let Some(Entry { content: Content::Table(below), .. }) = base.get_mut(&key)
            && let Content::Table(above) = entry.content
        {
            merge(below, above);
        } else {
            base.insert(key, entry);
        }
    }
}

/// Turns the parser's byte offsets into lines and columns.
struct Lines<'a> {
    text: &'a str,
    /// Where each line begins.
    starts: Vec<usize>,
    layer: usize,
    file: Arc<Path>,
}

impl<'a> Lines<'a> {
    fn of(text: &'a str, layer: usize, file: &Path) -> Self {
        let starts = [0].into_iter().chain(text.match_indices('\n').map(|(newline, _)| newline + 1)).collect();
        Self { text, starts, layer, file: file.into() }
    }

    fn place(&self, offset: usize) -> Place {
        let offset = self.text.floor_char_boundary(offset);
        let line = self.starts.partition_point(|start| *start <= offset);
        let column = self.text[self.starts[line - 1]..offset].chars().count() + 1;
        Place::File { layer: self.layer, line, column, file: self.file.clone() }
    }

    fn problem(&self, error: &toml::de::Error) -> Problem {
        let offset = self.text.floor_char_boundary(error.span().map_or(0, |span| span.start));
        let found = match self.text[offset..].lines().next().map(str::trim_end) {
            None | Some("") => "the end of the line".to_owned(),
            Some(rest) => quote(rest),
        };
        Problem::at(self.place(offset), format!("found {found}: {}", error.message().trim().replace('\n', ", ")))
    }

    fn table(&self, table: DeTable<'_>, problems: &mut Vec<Problem>) -> Table {
        let mut entries = Table::new();
        for (key, value) in table {
            let place = self.place(key.span().start);
            match self.content(value, problems) {
                Ok(content) => drop(entries.insert(key.into_inner().into_owned(), Entry { place, content })),
                Err(problem) => problems.push(problem),
            }
        }
        entries
    }

    fn content(&self, value: Spanned<DeValue<'_>>, problems: &mut Vec<Problem>) -> Result<Content, Problem> {
        let span = value.span();
        match value.into_inner() {
            DeValue::Table(table) => Ok(Content::Table(self.table(table, problems))),
            plain => self.plain(Spanned::new(span, plain)).map(Content::Plain),
        }
    }

    fn plain(&self, value: Spanned<DeValue<'_>>) -> Result<Value, Problem> {
        let place = self.place(value.span().start);
        let too_large = |number: &dyn Display| {
            let text = format!("found {}, expected a number that fits 64 bits", quote(&number.to_string()));
            Problem::at(place, text)
        };
        Ok(match value.into_inner() {
            DeValue::String(text) => Value::String(text.into_owned()),
            DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) => Value::Integer(number),
                Err(_) => return Err(too_large(&number)),
            },
            DeValue::Float(number) => match number.as_str().parse() {
                Ok(number) => Value::Float(number),
                Err(_) => return Err(too_large(&number)),
            },
            DeValue::Boolean(value) => Value::Boolean(value),
            DeValue::Datetime(value) => Value::Datetime(value),
            DeValue::Array(values) => {
                Value::Array(values.into_iter().map(|value| self.plain(value)).collect::<Result<_, _>>()?)
            }
            DeValue::Table(table) => {
                let entries =
                    table.into_iter().map(|(key, value)| Ok((key.into_inner().into_owned(), self.plain(value)?)));
                Value::Table(entries.collect::<Result<_, _>>()?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Table {
        parse(text, 0, Path::new("/c.toml")).unwrap()
    }

    fn plain(table: Table) -> String {
        toml::to_string(&table.into_iter().map(|(key, entry)| (key, entry.to_value())).collect::<toml::Table>())
            .unwrap()
    }

    #[test]
    fn tables_merge_and_arrays_are_replaced() {
        let mut base = read("[a]\nkept = 1\nlist = [1, 2]\n[a.deep]\nx = 1");
        merge(&mut base, read("[a]\nlist = [3]\n[a.deep]\ny = 2"));
        assert_eq!(plain(base), "[a]\nkept = 1\nlist = [3]\n\n[a.deep]\nx = 1\ny = 2\n");
    }

    #[test]
    fn a_value_keeps_its_place_through_a_merge() {
        let mut base = read("[a]\nx = 1");
        merge(&mut base, parse("\n[a]\n  y = 2", 1, Path::new("/d.toml")).unwrap());
        let Content::Table(a) = &base["a"].content else { panic!("a is a table") };
        assert_eq!((a["x"].place.to_string(), a["y"].place.to_string()), ("/c.toml:2:1".into(), "/d.toml:3:3".into()));
    }

    #[test]
    fn columns_count_characters() {
        let problems = parse("\"äöü\" = 99999999999999999999", 0, Path::new("/c.toml")).unwrap_err();
        assert!(problems[0].to_string().starts_with("/c.toml:1:9: "), "{}", problems[0]);
    }

    #[test]
    fn every_syntax_error_is_reported() {
        assert_eq!(parse("a = \nb = 1\nb = 2\nc = [", 0, Path::new("/c.toml")).unwrap_err().len(), 3);
    }
}
