//! `caisson config`: reads the files itself, so it also judges one that no service has seen.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::bail;
use caisson_config_service::{
    installation::Installation,
    resolve::{Resolved, Resolver},
};
use clap::Subcommand;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Tell every problem of configurations, with file, line and what would be accepted.
    ///
    /// Drop-ins in config.d beside a file are part of it. Ends with 1 when there is a problem.
    Check {
        /// Configurations; without any, the one that a sandbox would get: $CAISSON_CONF_FILE,
        /// /etc/caisson/configuration.toml, or the shipped one.
        files: Vec<PathBuf>,
    },
    /// Show every value that is in force, defaults too.
    Show {
        /// Tell where each value comes from.
        #[arg(long)]
        origin: bool,
        /// A configuration; without it, the one that a sandbox would get.
        file: Option<PathBuf>,
    },
}

pub(crate) async fn run(command: Command) -> anyhow::Result<()> {
    let mut resolver = Resolver::new(Installation::of_this_program());
    match command {
        Command::Check { files } => check(&mut resolver, &files).await,
        Command::Show { origin, file } => {
            let resolved = resolver.resolve(absolute(file.as_deref())?.as_deref()).await?;
            Ok(io::stdout().lock().write_all(show(&resolved, origin).as_bytes())?)
        }
    }
}

async fn check(resolver: &mut Resolver, files: &[PathBuf]) -> anyhow::Result<()> {
    let requested: Vec<_> =
        if files.is_empty() { vec![None] } else { files.iter().map(|file| Some(&**file)).collect() };
    let mut bad = 0;
    for file in requested {
        match resolver.resolve(absolute(file)?.as_deref()).await {
            Ok(resolved) => writeln!(io::stdout(), "{}: good", resolved.config.origin)?,
            Err(problems) => {
                bad += 1;
                writeln!(io::stdout(), "{problems}")?;
            }
        }
    }
    match (bad, files.len()) {
        (0, _) => Ok(()),
        (_, 0 | 1) => bail!("the configuration cannot be used"),
        (bad, all) => bail!("{bad} of {all} configurations cannot be used"),
    }
}

/// The settings as TOML, in tables, with their origins as comments.
fn show(resolved: &Resolved, origin: bool) -> String {
    let mut text = format!("# {}\n", resolved.config.origin);
    let mut table = "";
    for setting in &resolved.settings {
        let (section, key) = setting.key.rsplit_once('.').unwrap_or(("", &setting.key));
        if section != table {
            text.push_str(&format!("\n[{section}]\n"));
            table = section;
        }
        text.push_str(&format!("{key} = {}", setting.value));
        if origin {
            text.push_str(&format!("  # {}", setting.origin()));
        }
        text.push('\n');
    }
    text
}

/// The service wants absolute paths; people type relative ones.
fn absolute(file: Option<&Path>) -> io::Result<Option<PathBuf>> {
    file.map(std::path::absolute).transpose()
}
