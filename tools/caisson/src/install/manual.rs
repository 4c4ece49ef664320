//! Manual pages and shell completions, generated from the command line itself.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;

/// File and content of each, below `prefix`.
pub(super) fn all(prefix: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut files = completions(prefix)?;
    let mut command = crate::Arguments::command();
    command.build();
    pages(&command, &prefix.join("share/man/man1"), &mut files)?;
    Ok(files)
}

fn completions(prefix: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let places = [
        (Shell::Bash, "share/bash-completion/completions/caisson"),
        (Shell::Zsh, "share/zsh/site-functions/_caisson"),
        (Shell::Fish, "share/fish/vendor_completions.d/caisson.fish"),
    ];
    places.into_iter().map(|(shell, place)| Ok((prefix.join(place), completions_of(shell)?))).collect()
}

/// The script that completes the command in `shell`.
pub(crate) fn completions_of(shell: Shell) -> anyhow::Result<String> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::Arguments::command(), "caisson", &mut script);
    String::from_utf8(script).with_context(|| format!("complete for {shell}"))
}

/// `caisson.1`, `caisson-sandbox.1`, `caisson-sandbox-exec.1`, …
fn pages(command: &Command, dir: &Path, files: &mut Vec<(PathBuf, String)>) -> anyhow::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page).with_context(|| format!("write the manual of {name}"))?;
    files.push((dir.join(format!("{name}.1")), String::from_utf8(page)?));
    for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
        pages(verb, dir, files)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_and_every_shell_its_completions() {
        let files = all(Path::new("/usr")).unwrap();
        for name in [
            "share/man/man1/caisson.1",
            "share/man/man1/caisson-sandbox-exec.1",
            "share/man/man1/caisson-config-import.1",
            "share/bash-completion/completions/caisson",
        ] {
            assert!(
                files.iter().any(|(path, text)| *path == Path::new("/usr").join(name) && !text.is_empty()),
                "{name}"
            );
        }
    }
}
