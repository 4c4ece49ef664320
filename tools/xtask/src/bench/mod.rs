//! `cargo xtask bench`: how long things take, what they cost, and where the time goes.

mod boot;
mod memory;
mod pod;
mod report;
mod run;
mod stages;
mod table;
mod tracer;
mod work;

use std::{env, io::stdout, time::Duration};

use anyhow::{Result, ensure};
use caisson_testbed::Installation;

use crate::{
    peers::{self, Peers},
    test_host::{Clock, Image, Machine, Task, TestHost},
};

/// The test host for measurements.
const MACHINE: Machine = Machine { clock: Clock::Instructions, memory_mib: 4096 };
const LIMIT: Duration = Duration::from_secs(3600);

/// While the processor waits for a disk of this machine, the clock of the test host runs on to its next timer: what is written
/// stays in memory, and what will be executed is read before anyone waits for it.
const IN_MEMORY: &str = r#"
mount -t tmpfs tmpfs /tmp
cat /usr/bin/containerd /usr/bin/containerd-shim-runc-v2 /usr/bin/ctr "${0%/*}"/caisson* "${0%/*}"/containerd-shim-* >/dev/null
qemu-system-x86_64 -machine none -device help >/dev/null
exec "$0" "$@"
"#;

/// What can be measured.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Hypervisors alone: from exec to the guest's first process; needs KVM, or --icount
    Boot(boot::Options),
    /// `ctr run --rm` of a tiny program, warm: stages, totals, memory
    Run(run::Options),
}

/// Where it is measured.
#[derive(clap::Args)]
pub struct Place {
    /// In a test host where one instruction takes one nanosecond, so that durations repeat: 1 ms is a million
    /// instructions, the emulated host's and guest's together
    #[arg(long)]
    icount: bool,
    /// In that test host: everything has been built
    #[arg(long, hide = true)]
    prepared: bool,
}

/// Measures and prints.
pub fn run(installation: &Installation, command: &Command) -> Result<()> {
    let place = match command {
        Command::Boot(options) => &options.place,
        Command::Run(options) => &options.place,
    };
    match command {
        _ if place.icount => run_in_test_host(installation),
        Command::Boot(options) => boot::run(installation, options),
        Command::Run(options) => run::run(installation, options),
    }
}

/// The same command, without the clock.
fn run_in_test_host(installation: &Installation) -> Result<()> {
    let program = installation.programs.join("xtask").display().to_string();
    let folder = format!("{}={}", peers::FOLDER, Peers::find(installation)?.folder.display());
    let arguments = env::args().skip(1).filter(|argument| !["--icount", "--no-setup"].contains(&argument.as_str()));
    let shell = ["env", &folder, "sh", "-c", IN_MEMORY].map(str::to_owned).into_iter();
    let command: Vec<String> =
        shell.chain([program, "--no-setup".to_owned()]).chain(arguments).chain(["--prepared".to_owned()]).collect();
    let host = TestHost::new(installation, Image::build(Image::SUITE)?, MACHINE)?;
    let task = Task { command: &command, stdin: false, console: false, limit: LIMIT };
    ensure!(host.run(&task, &mut stdout())? == 0, "the measurement failed in the test host");
    Ok(())
}
