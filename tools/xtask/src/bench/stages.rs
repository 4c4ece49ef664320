//! The durations that the shim tells in its log, as `stages="name=milliseconds …"`.

/// Milliseconds by name, in the log's order.
pub type Stages = Vec<(String, f64)>;

/// The stages of one log line. What is not `name=number` is left out.
pub fn parse(line: &str) -> Stages {
    let Some((_, rest)) = line.split_once("stages=\"") else { return Stages::new() };
    let text = rest.split('"').next().unwrap_or_default();
    let pair = |word: &str| {
        let (name, milliseconds) = word.split_once('=')?;
        Some((name.to_owned(), milliseconds.parse().ok()?))
    };
    text.split_whitespace().filter_map(pair).collect()
}

/// The middle value; the mean of the two middle ones when there is an even number of them.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_read_in_order_whatever_their_names() {
        let line = "2026-01-01T00:00:00Z  INFO sandbox started id=x stages=\"config=1.2 b-c=30\" more=1";
        assert_eq!(parse(line), [("config".to_owned(), 1.2), ("b-c".to_owned(), 30.0)]);
    }

    #[test]
    fn a_line_without_stages_has_none() {
        assert!(parse("sandbox started").is_empty());
        assert!(parse("stages=\"x y=z\"").is_empty());
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median([]), None);
    }
}
