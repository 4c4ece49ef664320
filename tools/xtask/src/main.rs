//! Developer automation: `cargo xtask <command>`. Everything that the scripts in `ci/` do is here.

mod bench;
mod build;
mod demo;
mod interrupt;
mod kvm_tests;
mod packages;
mod peers;
mod results;
mod setup;
mod step;
mod test;
mod test_host;

use std::{path::PathBuf, process::ExitCode, time::Instant};

use anyhow::Result;
use caisson_testbed::Installation;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Developer automation for caisson")]
struct Cli {
    /// Takes what the last set-up has built, as it is
    #[arg(long, global = true)]
    no_setup: bool,
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
    /// Runs the tests that need KVM, in a test host where this machine has none
    TestKvm {
        /// Only the batches whose names contain one of these
        #[arg(value_name = "NAME")]
        only: Vec<String>,
        /// Where KVM works: with this cargo-nextest, and the tests as they were listed last
        #[arg(long, value_name = "NEXTEST", hide = true)]
        here: Option<PathBuf>,
        /// The batch to run so, counted from 0
        #[arg(long, hide = true, default_value_t = 0)]
        batch: usize,
    },
    /// Prints what the last KVM tests found of each hypervisor, as a Markdown table
    Results {
        /// The file of their results, one in JSON on each line
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// Measures
    #[command(subcommand)]
    Bench(bench::Command),
    /// Runs commands in a machine where KVM works
    #[command(subcommand)]
    TestHost(test_host::Command),
}

fn main() -> ExitCode {
    let started = Instant::now();
    interrupt::clean_up_on_signals();
    match run(Cli::parse()) {
        Ok(code) => {
            eprintln!("finished in {}", step::human(started.elapsed()));
            code
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let installation = if cli.no_setup { Installation::find()? } else { setup::set_up()? };
    match cli.command {
        Command::Setup => {}
        Command::Demo => demo::run(&installation)?,
        Command::Test { arguments } => test::test(&installation, &arguments)?,
        Command::TestKvm { here: Some(nextest), batch, .. } => {
            return kvm_tests::test_as_prepared(&installation, &nextest, batch);
        }
        Command::TestKvm { here: None, only, .. } => kvm_tests::test(&installation, &only)?,
        Command::Results { file } => {
            let file = file.unwrap_or_else(|| results::Results::path(&installation));
            print!("{}", results::Results::read(&file)?.to_markdown(&[]));
        }
        Command::Bench(command) => bench::run(&installation, &command)?,
        Command::TestHost(command) => return test_host::run(&installation, &command),
    }
    Ok(ExitCode::SUCCESS)
}
