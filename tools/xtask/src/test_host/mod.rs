//! `cargo xtask test-host`: a machine where KVM works, wherever this runs. A Debian system in QEMU, whose emulated
//! processor has AMD's virtualisation; the folders of this machine that caisson needs are in it at the same paths.

mod child;
mod image;
mod machine;
mod run;
mod share;

use std::{
    io::stdout,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Command as Program, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result};
use caisson_testbed::{Accelerator, Installation};

pub use image::Image;
pub use machine::{Clock, Machine};
pub use run::{Task, TestHost};

use crate::step::step;

/// What can be done with it.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Runs a command where KVM works: here, or in a machine that is booted for it and ends with it
    Run(Options),
}

/// What is run, and in what.
#[derive(clap::Args)]
pub struct Options {
    /// Debian release of the test host
    #[arg(long, default_value = Image::SUITE, value_parser = Image::SUITES)]
    suite: String,
    /// One instruction takes one nanosecond of the test host's clock, so that durations repeat; one processor, slower
    #[arg(long, conflicts_with = "cpus")]
    icount: bool,
    /// The test host's memory in MiB
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(512..))]
    memory_mib: u64,
    /// So many processors on this machine's clock, instead of one whose clock goes by what it executes
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: Option<u32>,
    /// Boots the test host even where KVM works without
    #[arg(long)]
    force: bool,
    /// Ends the command, and the test host with it, after so many seconds
    #[arg(long, default_value_t = 1800, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// Gives the command this program's standard input, instead of an empty one
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Shows what the test host's kernel says, on standard error
    #[arg(long)]
    console: bool,
    /// One more folder of this machine that the command sees, at its path
    #[arg(long, value_name = "FOLDER")]
    share: Vec<PathBuf>,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

impl Options {
    fn clock(&self) -> Clock {
        match self.cpus {
            _ if self.icount => Clock::Instructions,
            Some(cpus) => Clock::Host { cpus },
            None => Clock::Work,
        }
    }
}

/// Does it. The exit code is the command's.
pub fn run(installation: &Installation, command: &Command) -> Result<ExitCode> {
    let Command::Run(options) = command;
    if !options.force && !options.icount {
        let accelerator = Accelerator::find(&installation.programs)?;
        if accelerator.is_kvm() {
            return run_here(&options.command);
        }
        eprintln!("    a test host is needed here: {}", accelerator.reason);
    }
    let image = image(&options.suite)?;
    let machine = Machine { clock: options.clock(), memory_mib: options.memory_mib };
    let mut host = TestHost::new(installation, image, machine)?;
    for folder in &options.share {
        host.share(folder)?;
    }
    let limit = Duration::from_secs(options.limit);
    let task = Task { command: &options.command, stdin: options.stdin, console: options.console, limit };
    host.run(&task, &mut stdout()).map(ExitCode::from)
}

/// What a test host boots from.
pub fn image(suite: &str) -> Result<Image> {
    step(&format!("build the test host (Debian {suite})"), || Image::build(suite))
}

/// This machine is as good as a test host.
fn run_here(command: &[String]) -> Result<ExitCode> {
    eprintln!("    KVM works here: no test host is needed (--force boots one)");
    let (program, arguments) = command.split_first().context("no command")?;
    let status = Program::new(program).args(arguments).status().with_context(|| format!("execute {program}"))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(code as u8))
}
