//! `caisson sandbox metrics`.

use caisson_protocol::sandbox::MetricsRequest;
use serde::Serialize;

use super::client::{Shim, deadline, told};
use crate::output::Format;

/// One line of Prometheus' text format.
#[derive(Debug, PartialEq, Serialize)]
struct Sample {
    name: String,
    /// As written: `cpu="0",mode="user"`.
    #[serde(skip_serializing_if = "String::is_empty")]
    labels: String,
    value: f64,
}

pub(super) async fn run(name: &str, format: Format) -> anyhow::Result<()> {
    let shim = Shim::of(name).await?;
    let answer = shim.sandbox.metrics(deadline(), &MetricsRequest::new()).await;
    let text = answer.map_err(told(format!("measure sandbox {}", shim.record.id)))?.text;
    // Part of it is the guest's.
    let text: String = text.chars().filter(|&character| character == '\n' || !character.is_control()).collect();
    format.print(&samples(&text), |_| text)
}

fn samples(text: &str) -> Vec<Sample> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let (series, value) = line.trim().rsplit_once(' ')?;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let labels = labels.strip_suffix('}').unwrap_or(labels).to_owned();
    Some(Sample { name: name.to_owned(), labels, value: value.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_keep_their_labels_and_comments_are_left_out() {
        let text = "# HELP a b\na 1\nb{x=\"1 2\",y=\"{\"} 2.5e3\nnonsense\n";
        let sample = |name: &str, labels: &str, value| Sample { name: name.into(), labels: labels.into(), value };
        assert_eq!(samples(text), [sample("a", "", 1.0), sample("b", "x=\"1 2\",y=\"{\"", 2500.0)]);
    }
}
