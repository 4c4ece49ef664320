//! `caisson sandbox`: what runs on this host, and how to look into it.

mod client;
mod console;
mod exec;
mod exec_streams;
mod found;
mod inspect;
mod json_lines;
mod list;
mod logs;
mod metrics;
mod raw_terminal;

use std::process::ExitCode;

use clap::Subcommand;

pub(crate) use found::all;

use crate::output::Format;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the sandboxes of this host, oldest first.
    #[command(after_help = "Examples:
  caisson sandbox list
  caisson sandbox list --json | jq -r '.[].id'")]
    List,
    /// Show one sandbox: its processes, its guest, its containers.
    #[command(after_help = "Examples:
  caisson sandbox inspect web
  caisson sandbox inspect web --json | jq .guest.kernel")]
    Inspect {
        /// The sandbox's id, or the beginning of it.
        sandbox: String,
    },
    /// Print what a sandbox's guest wrote to its console.
    Logs(logs::Arguments),
    /// Run a program in one of a sandbox's containers; ends with the program's exit code.
    Exec(exec::Arguments),
    /// Open a shell in the guest itself, outside of the containers.
    ///
    /// Refused unless the sandbox's configuration had `debug_console_enabled = true` in `[agent]` when it started.
    #[command(after_help = "Examples:
  caisson sandbox console web
  echo dmesg | caisson sandbox console web
  echo dmesg | caisson sandbox console web --json | jq -r .line")]
    Console {
        /// The sandbox's id, or the beginning of it.
        sandbox: String,
    },
    /// Print what launcher and guest count, in Prometheus' text format.
    #[command(after_help = "Examples:
  caisson sandbox metrics web
  caisson sandbox metrics web --json | jq '.[] | select(.name == \"caisson_agent_resident_bytes\").value'")]
    Metrics {
        /// The sandbox's id, or the beginning of it.
        sandbox: String,
    },
}

pub(crate) async fn run(command: Command, format: Format) -> anyhow::Result<ExitCode> {
    match command {
        Command::List => list::run(format)?,
        Command::Inspect { sandbox } => inspect::run(&sandbox, format).await?,
        Command::Logs(arguments) => logs::run(&arguments, format)?,
        Command::Exec(arguments) => return exec::run(arguments, format).await,
        Command::Console { sandbox } => console::run(&sandbox, format).await?,
        Command::Metrics { sandbox } => metrics::run(&sandbox, format).await?,
    }
    Ok(ExitCode::SUCCESS)
}
