//! Developer automation: `cargo xtask <command>`. Everything that the scripts in `ci/` do is here.

mod bench;
mod build;
mod demo;
mod interrupt;
mod packages;
mod setup;
mod step;
mod test;

use std::{process::ExitCode, time::Instant};

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Developer automation for caisson")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs and builds everything that the other commands need
    Setup,
    /// Runs one container in a virtual machine of its own and cleans up
    Demo,
    /// Checks formatting and lints and runs all tests, end to end included
    Test {
        /// For nextest: filters, --no-capture, …
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Measures
    #[command(subcommand)]
    Bench(bench::Command),
}

fn main() -> ExitCode {
    let started = Instant::now();
    interrupt::clean_up_on_signals();
    match run(Cli::parse().command) {
        Ok(()) => {
            eprintln!("finished in {}", step::human(started.elapsed()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let installation = setup::set_up()?;
    match command {
        Command::Setup => Ok(()),
        Command::Demo => demo::run(&installation),
        Command::Test { arguments } => test::test(&arguments),
        Command::Bench(command) => bench::run(&installation, &command),
    }
}
