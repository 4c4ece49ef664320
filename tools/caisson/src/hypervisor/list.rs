//! `caisson hypervisor list`: every hypervisor of the product, and any other that has a launcher.

use std::{collections::BTreeMap, path::PathBuf};

use caisson_config_service::{
    installation::Installation,
    resolve::Resolver,
    switch::{self, Listed},
};
use serde::Serialize;

use super::{
    configuration_of,
    features::{self, Answer},
    known::{self, Known},
};
use crate::{
    launcher::{self, Capabilities},
    output::{Format, table},
};

/// One line of the list.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    name: String,
    #[serde(flatten)]
    known: Option<Facts>,
    /// Whether new sandboxes get it.
    in_force: bool,
    /// The file by which it was asked; none where the launcher chose.
    configuration: Option<PathBuf>,
    /// Why no sandbox can be made by that file.
    problems: Vec<String>,
    /// None when it is not installed.
    launcher: Option<PathBuf>,
    #[serde(flatten)]
    found: Found,
}

#[derive(Debug, Serialize)]
struct Facts {
    short: &'static str,
    architectures: &'static [&'static str],
    #[serde(rename = "type")]
    kind: &'static str,
}

/// What the launcher answered.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Found {
    Works {
        /// The hypervisor's own.
        program: PathBuf,
        version: String,
        /// Empty where it cannot run.
        accelerator: String,
        accelerator_reason: String,
        features: BTreeMap<&'static str, Answer>,
    },
    DoesNot {
        problem: String,
    },
}

pub(super) async fn run(installation: Installation, format: Format) -> anyhow::Result<()> {
    let dirs = installation.program_dirs.clone();
    let mut resolver = Resolver::new(installation);
    let configurations = switch::list(&mut resolver).await;
    let mut lines = Vec::new();
    // One after the other: launchers that try KVM at the same time keep each other from it.
    for name in names(&dirs) {
        lines.push(line(&name, &dirs, configuration_of(&configurations, &name)).await);
    }
    format.print(&lines, |lines| text(lines))?;
    // What is in force may be so wrong that it names none of them.
    if !lines.iter().any(|line| line.in_force)
        && let Err(problems) = resolver.resolve(None).await
    {
        eprintln!("caisson: no hypervisor is in force: {problems}");
    }
    Ok(())
}

/// The product's in their order, then others that have a launcher.
fn names(dirs: &[PathBuf]) -> Vec<String> {
    let mut names: Vec<_> = known::ALL.iter().map(|known| known.name.to_owned()).collect();
    let others = launcher::installed(dirs).into_iter().filter(|name| !names.contains(name));
    let others: Vec<_> = others.collect();
    names.extend(others);
    names
}

async fn line(name: &str, dirs: &[PathBuf], configuration: Option<&Listed>) -> Line {
    let launcher = launcher::find(dirs, name);
    let config = configuration.map(|listed| &listed.config);
    let found = match &launcher {
        None => Found::DoesNot { problem: format!("not installed: there is no caisson-vmm-{name}") },
        Some(launcher) => match launcher::capabilities(launcher, config).await {
            Ok(told) => works(told.program(launcher), told),
            Err(error) => Found::DoesNot { problem: format!("{error:#}") },
        },
    };
    let known = known::find(name).map(|Known { name, architectures, kind, .. }| Facts {
        short: known::short(name),
        architectures,
        kind,
    });
    Line {
        name: name.to_owned(),
        known,
        in_force: configuration.is_some_and(|listed| listed.in_force),
        configuration: configuration.map(|listed| listed.path.clone()),
        problems: configuration.map(|listed| listed.problems.clone()).unwrap_or_default(),
        launcher,
        found,
    }
}

fn works(program: PathBuf, told: Capabilities) -> Found {
    let features = features::ALL.iter().map(|feature| (feature.name, feature.of(&told))).collect();
    let (accelerator, accelerator_reason) = (told.accelerator, told.accelerator_reason);
    Found::Works { program, version: told.version, accelerator, accelerator_reason, features }
}

fn text(lines: &[Line]) -> String {
    let mut head = vec!["", "NAME", "SHORT", "PROGRAM", "VERSION", "BY", "TYPE", "ARCHITECTURES"];
    head.extend(features::ALL.iter().map(|feature| feature.heading));
    let mut list = table(&head);
    for line in lines {
        list.add_row(cells(line));
    }
    let mut text = list.trim_fmt();
    text.push_str("\n\n* is what new sandboxes get. FILES is file sharing; BLOCK, NET, CPU and MEMORY are hotplug.\n");
    let why = lines.iter().flat_map(why_not).collect::<Vec<_>>();
    if !why.is_empty() {
        text.push_str("\nWhy not:\n");
        why.iter().for_each(|sentence| text.push_str(&format!("  {sentence}\n")));
    }
    text
}

fn cells(line: &Line) -> Vec<String> {
    let star = if line.in_force { "*" } else { "" };
    let (short, kind, architectures) = match &line.known {
        Some(known) => (known.short, known.kind, known.architectures.join(" ")),
        None => ("-", "-", "-".to_owned()),
    };
    let (program, version, accelerator, answers): (_, _, _, Vec<_>) = match &line.found {
        Found::Works { program, version, accelerator, features, .. } => {
            let words = features::ALL.iter().map(|feature| match features.get(feature.name) {
                Some(Answer::Yes) => "yes",
                Some(Answer::No(_)) | None => "no",
            });
            let accelerator = if accelerator.is_empty() { "-" } else { accelerator };
            (program.display().to_string(), first_number(version), accelerator, words.collect())
        }
        Found::DoesNot { .. } => ("-".to_owned(), "-", "-", vec!["-"; features::ALL.len()]),
    };
    let cells = [star, &line.name, short, &program, version, accelerator, kind, &architectures];
    cells.into_iter().chain(answers).map(str::to_owned).collect()
}

/// Features that are missing for the same reason share a sentence.
fn why_not(line: &Line) -> Vec<String> {
    let name = &line.name;
    let (mut sentences, by_reason) = match &line.found {
        Found::DoesNot { problem } => (vec![format!("{name}: {problem}")], Vec::new()),
        Found::Works { accelerator, accelerator_reason, features, .. } => {
            let does_not_run = accelerator.is_empty().then(|| format!("{name}: cannot run here: {accelerator_reason}"));
            (does_not_run.into_iter().collect(), missing(features))
        }
    };
    // What else is wrong with the configuration of one that does not run matters only when that is in force.
    if line.in_force || sentences.is_empty() {
        let problems = line.problems.iter();
        sentences.extend(problems.map(|problem| format!("{name}: its configuration cannot be used: {problem}")));
    }
    let sentence = |(reason, words): (&str, Vec<&str>)| format!("{name}: no {}: {reason}", words.join(", "));
    sentences.extend(by_reason.into_iter().map(sentence));
    sentences
}

/// What a hypervisor has not, by the reason.
fn missing<'a>(features: &'a BTreeMap<&'static str, Answer>) -> Vec<(&'a str, Vec<&'static str>)> {
    let mut by_reason: Vec<(&str, Vec<&str>)> = Vec::new();
    for feature in &features::ALL {
        let Some(Answer::No(reason)) = features.get(feature.name) else { continue };
        match by_reason.iter_mut().find(|(known, _)| known == reason) {
            Some((_, words)) => words.push(feature.words),
            None => by_reason.push((reason, vec![feature.words])),
        }
    }
    by_reason
}

/// Of "QEMU emulator version 7.2.22 (Debian …)" the number: the rest is told by `show`.
fn first_number(version: &str) -> &str {
    let word =
        version.split_whitespace().find(|word| word.trim_start_matches('v').starts_with(|c: char| c.is_ascii_digit()));
    word.unwrap_or(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told() -> Capabilities {
        Capabilities {
            version: "QEMU emulator version 7.2.22 (Debian 1:7.2)".into(),
            accelerator: "tcg".into(),
            devices: vec!["fs".into()],
            missing: [("tdx", "needs KVM"), ("sev-snp", "needs KVM"), ("snapshot", "not written yet")]
                .map(|(key, why)| (key.to_owned(), why.to_owned()))
                .into(),
            ..Capabilities::default()
        }
    }

    fn qemu() -> Line {
        Line {
            name: "qemu".into(),
            known: None,
            in_force: true,
            configuration: None,
            problems: Vec::new(),
            launcher: Some("/x".into()),
            found: works("/q".into(), told()),
        }
    }

    #[test]
    fn the_version_in_the_list_is_the_number() {
        assert_eq!(first_number("QEMU emulator version 7.2.22 (Debian 1:7.2)"), "7.2.22");
        assert_eq!(first_number("Firecracker v1.16.1"), "v1.16.1");
        assert_eq!(first_number("odd"), "odd");
    }

    #[test]
    fn features_that_are_missing_for_one_reason_share_a_sentence() {
        let told = why_not(&qemu());
        assert!(told.contains(&"qemu: no TDX, SEV-SNP: needs KVM".to_owned()), "{told:?}");
        assert!(told.contains(&"qemu: no snapshot: not written yet".to_owned()), "{told:?}");
        assert!(!told.iter().any(|sentence| sentence.contains("file sharing")), "{told:?}");
    }

    #[test]
    fn a_hypervisor_that_cannot_run_here_has_a_dash_and_a_reason() {
        let told = Capabilities { accelerator: String::new(), accelerator_reason: "it needs KVM".into(), ..told() };
        let line = Line { found: works("/q".into(), told), ..qemu() };
        assert_eq!(cells(&line)[5], "-");
        let problems = vec!["no kernel".to_owned()];
        let line = Line { in_force: false, problems, ..line };
        let told = why_not(&line);
        assert_eq!(told[0], "qemu: cannot run here: it needs KVM");
        assert!(!told.iter().any(|sentence| sentence.contains("no kernel")), "{told:?}");
    }

    #[tokio::test]
    async fn a_hypervisor_without_launcher_is_in_the_list_and_said_not_to_be_installed() {
        let line = line("acrn", &["/nonexistent".into()], None).await;
        let text = text(&[line]);
        assert!(text.contains("acrn: not installed: there is no caisson-vmm-acrn"), "{text}");
    }

    #[test]
    fn json_tells_every_feature_with_its_reason() {
        let json = serde_json::to_value(qemu()).unwrap();
        assert_eq!(json["features"]["file_sharing"], "yes");
        assert_eq!(json["features"]["tdx"]["no"], "needs KVM");
        assert_eq!(json["in_force"], true);
        assert_eq!((&json["program"], &json["launcher"]), (&"/q".into(), &"/x".into()));
    }
}
