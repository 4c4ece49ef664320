//! `caisson config check`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use caisson_config_service::{installation::Installation, resolve::Resolver};
use serde::Serialize;

use super::absolute;
use crate::output::Format;

/// What is wrong with one configuration.
#[derive(Serialize)]
struct Checked {
    /// None when no configuration was found.
    file: Option<PathBuf>,
    problems: Vec<String>,
}

pub(super) async fn run(installation: Installation, files: &[PathBuf], format: Format) -> anyhow::Result<ExitCode> {
    let mut resolver = Resolver::new(installation);
    let requested: Vec<_> =
        if files.is_empty() { vec![None] } else { files.iter().map(|file| Some(&**file)).collect() };
    let mut checked = Vec::new();
    for file in requested {
        checked.push(check(&mut resolver, file).await?);
    }
    format.print(&checked, |checked| text(checked))?;
    let is_good = checked.iter().all(|checked| checked.problems.is_empty());
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn check(resolver: &mut Resolver, file: Option<&Path>) -> anyhow::Result<Checked> {
    Ok(match resolver.resolve(absolute(file)?.as_deref()).await {
        Ok(resolved) => Checked { file: Some(resolved.config.origin.into()), problems: Vec::new() },
        Err(problems) => Checked { file: problems.file.clone(), problems: problems.sentences() },
    })
}

fn text(checked: &[Checked]) -> String {
    let mut text = String::new();
    for Checked { file, problems } in checked {
        problems.iter().for_each(|problem| text.push_str(&format!("{problem}\n")));
        if let Some(file) = file {
            let verdict = match problems.len() {
                0 => "good".to_owned(),
                1 => "1 problem; it cannot be used".to_owned(),
                count => format!("{count} problems; it cannot be used"),
            };
            text.push_str(&format!("{}: {verdict}\n", file.display()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_judged_after_its_problems() {
        let checked = [
            Checked { file: Some("/a".into()), problems: vec![] },
            Checked { file: Some("/b".into()), problems: vec!["/b:1:1: x: no".into()] },
            Checked { file: None, problems: vec!["there is none".into()] },
        ];
        assert_eq!(text(&checked), "/a: good\n/b:1:1: x: no\n/b: 1 problem; it cannot be used\nthere is none\n");
    }
}
