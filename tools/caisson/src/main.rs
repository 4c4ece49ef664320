//! The `caisson` command: what a person asks of caisson on one host.

mod config;
mod logs;
mod sandboxes;
mod terminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Containers in virtual machines: look at configurations and sandboxes.
#[derive(Parser)]
#[command(name = "caisson", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check and show configurations.
    #[command(subcommand)]
    Config(config::Command),
    /// See the sandboxes of this host.
    #[command(subcommand)]
    Sandbox(sandboxes::Command),
    /// Print what a sandbox's guest wrote to its console.
    Logs(logs::Arguments),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Config(command) => config::run(command).await,
        Command::Sandbox(command) => sandboxes::run(command),
        Command::Logs(arguments) => logs::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("caisson: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
