//! The command line that every backend's binary has.

use std::{path::PathBuf, process::ExitCode};

use caisson_protocol::vmm::CapabilitiesResponse;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{
    guest_vsock,
    hypervisor::{Hypervisor, capabilities, program},
    options::with_defaults,
    run, serve,
};

#[derive(Parser)]
#[command(version, about = "Runs one virtual machine for caisson")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the Vmm contract on the listening Unix socket that is standard input
    Serve,
    /// Boot a VM with its console on this terminal; Ctrl-] ends it
    Run(Box<RunArgs>),
    /// Print this hypervisor's own option keys as JSON
    Options,
    /// Print what the hypervisor can do on this machine
    Capabilities {
        /// The hypervisor's executable
        #[arg(long, default_value = "", hide_default_value = true)]
        hypervisor: String,
        /// Some of the keys that `options` prints, as TOML: machine_type = "q35"
        #[arg(long, value_name = "TOML", default_value = "", hide_default_value = true)]
        options: String,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Serve the vsock of a guest; for this program itself
    #[command(name = guest_vsock::SERVE_VSOCK, hide = true)]
    ServeVsock {
        /// Where host programs connect
        socket: PathBuf,
    },
}

/// A VM on the command line.
#[derive(Args)]
pub(crate) struct RunArgs {
    /// The hypervisor's executable
    #[arg(long)]
    pub(crate) hypervisor: Option<PathBuf>,
    /// Guest kernel
    #[arg(long)]
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, conflicts_with = "image")]
    pub(crate) initrd: Option<PathBuf>,
    /// Root disk image
    #[arg(long)]
    pub(crate) image: Option<PathBuf>,
    /// Memory in MiB
    #[arg(long, default_value_t = 256)]
    pub(crate) memory: u64,
    /// Virtual processors
    #[arg(long, default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// Additional kernel parameters
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub(crate) append: String,
    /// A directory for the guest to mount with virtio-fs: TAG=DIRECTORY
    #[arg(long, value_name = "TAG=DIRECTORY")]
    pub(crate) share: Vec<String>,
    /// virtiofsd, for --share
    #[arg(long, default_value = "/usr/libexec/virtiofsd")]
    pub(crate) virtiofsd: PathBuf,
    /// A raw disk image or block device
    #[arg(long)]
    pub(crate) disk: Vec<PathBuf>,
    /// A tap interface for the guest's network
    #[arg(long)]
    pub(crate) tap: Vec<String>,
    /// Give the guest vsock, on the host at this socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) vsock: Option<PathBuf>,
    /// Short for --set machine_type=…
    #[arg(long)]
    pub(crate) machine: Option<String>,
    /// Short for --set accel=…
    #[arg(long)]
    pub(crate) accel: Option<String>,
    /// One of the keys that `options` prints: KEY=VALUE
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

/// What a backend's `main` calls.
pub fn main<H: Hypervisor>() -> ExitCode {
    let name = format!("caisson-vmm-{}", H::NAME);
    let matches = Cli::command().display_name(name.clone()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let quiet = !matches!(cli.command, Command::Serve);
    log_to_stderr(if quiet { "warn" } else { "info" });
    match execute::<H>(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Of threads that wait for the host. Too small for a huge page, which a host that has them for everything would give it.
const STACK_BYTES: usize = 512 << 10;

fn execute<H: Hypervisor>(command: Command) -> anyhow::Result<ExitCode> {
    if let Command::ServeVsock { socket } = command {
        guest_vsock::serve_vsock(&socket)?;
        return Ok(ExitCode::SUCCESS);
    }
    // One thread: children ask to die with the thread that starts them.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().thread_stack_size(STACK_BYTES).build()?;
    let code = match command {
        Command::ServeVsock { .. } => unreachable!("it needs no runtime"),
        Command::Serve => runtime.block_on(serve::serve::<H>()).map(|()| ExitCode::SUCCESS),
        Command::Run(arguments) => runtime.block_on(run::run::<H>(*arguments)),
        Command::Options => {
            let options = with_defaults(H::options(), &[("path", program(H::DEFAULT_PATH).into())]);
            println!("{}", serde_json::to_string_pretty(&options)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Capabilities { hypervisor, options, json } => {
            let told = runtime.block_on(capabilities::<H>(&hypervisor, &options))?;
            match json {
                true => println!("{:#}", capabilities_json(&told)),
                false => print!("{}", capabilities_text(&told)),
            }
            Ok(ExitCode::SUCCESS)
        }
    };
    // A read from a terminal cannot be interrupted: nobody waits for it.
    runtime.shutdown_background();
    code
}

fn capabilities_text(told: &CapabilitiesResponse) -> String {
    let accelerator = if told.accelerator.is_empty() { "none" } else { &told.accelerator };
    let words = |words: &[String]| if words.is_empty() { "none".to_owned() } else { words.join(" ") };
    format!(
        "version:     {}\naccelerator: {accelerator} ({})\ndevices:     {}\nhotplug:     {}\noperations:  {}\nfeatures:    {}\n",
        told.version,
        told.accelerator_reason,
        words(&told.devices),
        words(&told.hotplug),
        words(&told.operations),
        words(&told.features)
    )
}

/// By the names of the message's fields.
fn capabilities_json(told: &CapabilitiesResponse) -> serde_json::Value {
    serde_json::json!({
        "version": told.version,
        "accelerator": told.accelerator,
        "accelerator_reason": told.accelerator_reason,
        "devices": told.devices,
        "hotplug": told.hotplug,
        "operations": told.operations,
        "confidential": told.confidential,
        "features": told.features,
        "missing": told.missing,
        "hypervisor_path": told.hypervisor_path,
    })
}

/// `$CAISSON_LOG` overrides `default`.
fn log_to_stderr(default: &str) {
    let filter = EnvFilter::try_from_env("CAISSON_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}
