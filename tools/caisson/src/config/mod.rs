//! `caisson config`: reads the files itself, so it also judges one that no service has seen.

mod check;
mod import;
mod reference;
mod show;

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use caisson_config_service::installation::Installation;
use clap::Subcommand;

use crate::output::Format;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Tell every problem of configurations, with file, line and what would be accepted.
    ///
    /// Drop-ins in config.d beside a file are part of it. Ends with 1 when there is a problem.
    #[command(after_help = "Examples:
  caisson config check
  caisson config check /etc/caisson/configuration-*.toml
  caisson config check --json new.toml | jq -r '.[].problems[]'")]
    Check {
        /// Configurations; without any, the one that a sandbox would get: $CAISSON_CONF_FILE,
        /// /etc/caisson/configuration.toml, or the shipped one.
        files: Vec<PathBuf>,
    },
    /// Show every value that is in force, defaults too.
    #[command(after_help = "Examples:
  caisson config show
  caisson config show --origin | grep default_memory
  caisson config show /etc/caisson/configuration-fc.toml")]
    Show {
        /// Tell where each value comes from.
        #[arg(long)]
        origin: bool,
        /// A configuration; without it, the one that a sandbox would get.
        file: Option<PathBuf>,
    },
    /// Make a configuration of one of Kata Containers', and tell what became of each key.
    Import(import::Arguments),
    /// Print every key with its meaning, default and range.
    #[command(after_help = "Examples:
  caisson config reference | less
  caisson config reference | grep -A3 default_vcpus")]
    Reference,
}

pub(crate) async fn run(command: Command, format: Format) -> anyhow::Result<ExitCode> {
    let installation = Installation::of_this_program();
    match command {
        Command::Check { files } => return check::run(installation, &files, format).await,
        Command::Show { origin, file } => show::run(installation, file.as_deref(), origin, format).await?,
        Command::Import(arguments) => import::run(installation, &arguments, format).await?,
        Command::Reference => reference::run(&installation, format).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The library wants absolute paths; people type relative ones.
fn absolute(file: Option<&Path>) -> io::Result<Option<PathBuf>> {
    file.map(std::path::absolute).transpose()
}
