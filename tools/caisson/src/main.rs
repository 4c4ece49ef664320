//! The `caisson` command: what a person asks of caisson on one host.

mod check;
mod config;
mod env;
mod hypervisor;
mod install;
mod sandbox;

mod built;
mod digest;
mod host;
mod launcher;
mod output;
mod program;
mod terminal;

use std::{io, process::ExitCode};

use clap::{Parser, Subcommand};

use output::Format;

/// Containers in virtual machines: set up, choose the hypervisor, see what runs.
#[derive(Parser)]
#[command(name = "caisson", version, arg_required_else_help = true)]
#[command(after_help = "Examples:
  caisson check                       can this machine run sandboxes? what is to do?
  caisson hypervisor list             what there is to choose from
  caisson hypervisor use qemu         choose; --previous undoes it
  caisson config show --origin        every value in force, and where it comes from
  caisson sandbox list                what runs on this host

Every command takes --json; what flows, as logs do, is then one object for each line. `caisson help COMMAND` tells more, with examples.")]
struct Arguments {
    /// Print JSON, for programs.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print what is in force here, with versions and digests of everything.
    Env(env::Arguments),
    /// Tell whether this machine and its configuration can run sandboxes, and what to do where not.
    Check(check::Arguments),
    /// See and choose the hypervisor.
    #[command(subcommand)]
    Hypervisor(hypervisor::Command),
    /// Check, show, import and look up configurations.
    #[command(subcommand)]
    Config(config::Command),
    /// See the sandboxes of this host, and into them.
    #[command(subcommand)]
    Sandbox(sandbox::Command),
    /// Install caisson on this host: programs, default files, containerd's registration.
    Install(install::Arguments),
    /// Take back what `caisson install` did.
    Uninstall(install::UninstallArguments),
    /// Print the completions of a shell.
    #[command(after_help = "Examples:
  caisson completions bash > /usr/share/bash-completion/completions/caisson
  caisson completions zsh > /usr/share/zsh/site-functions/_caisson")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Arguments { json, command } = Arguments::parse();
    match run(command, if json { Format::Json } else { Format::Text }).await {
        Ok(code) => code,
        // Whoever read our output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("caisson: {error:#}{}", remedy(&error, nix::unistd::geteuid().is_root()));
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command, format: Format) -> anyhow::Result<ExitCode> {
    match command {
        Command::Env(arguments) => env::run(arguments, format).await?,
        Command::Check(arguments) => return check::run(arguments, format).await,
        Command::Hypervisor(command) => hypervisor::run(command, format).await?,
        Command::Config(command) => return config::run(command, format).await,
        Command::Sandbox(command) => return sandbox::run(command, format).await,
        Command::Install(arguments) => install::run(arguments, format).await?,
        Command::Uninstall(arguments) => install::undo(&arguments, format)?,
        Command::Completions { shell } => {
            let script = install::completions(shell)?;
            format.print(&serde_json::json!({ "completions": script }), |_| script.clone())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// What to do about it, as the end of a sentence, where that is certain.
fn remedy(error: &anyhow::Error, is_root: bool) -> &'static str {
    let is_denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    let denied = error.chain().filter_map(|cause| cause.downcast_ref()).any(is_denied);
    if denied && !is_root { "; run this as root" } else { "" }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn who_may_not_is_told_to_become_root() {
        let denied = anyhow::Error::new(io::Error::from(io::ErrorKind::PermissionDenied)).context("install /usr/bin/x");
        assert_eq!(remedy(&denied, false), "; run this as root");
        assert_eq!(remedy(&denied, true), "");
        assert_eq!(remedy(&anyhow::Error::new(io::Error::from(io::ErrorKind::NotFound)), false), "");
    }

    #[test]
    fn every_verb_says_what_it_is_for() {
        let mut waiting = vec![Arguments::command()];
        while let Some(command) = waiting.pop() {
            assert!(command.get_about().is_some(), "{} has no help", command.get_name());
            waiting.extend(command.get_subcommands().cloned());
        }
    }
}
