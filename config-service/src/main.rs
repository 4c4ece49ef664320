//! The config-service's program: `serve` for shims, `check` and `resolve` for people, `generate` for packagers.

use std::{
    env, fs, io,
    os::{fd::AsFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use caisson_config_service::{
    client::ConfigService,
    configurations::Configurations,
    defaults,
    installation::Installation,
    reference,
    resolve::{Resolved, Resolver},
    service,
};
use caisson_protocol::{listen, paths};
use clap::{Parser, Subcommand};
use tracing::info;
use tracing_subscriber::{Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};
use ttrpc::asynchronous::transport::Listener;

/// Turns configuration files into the checked configuration of a sandbox.
#[derive(Parser)]
#[command(name = "caisson-config-service", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve shims on the socket that is standard input, or else on a socket of its own.
    Serve {
        /// End when nobody was connected for so many seconds; 0: never.
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        idle_timeout: u64,
    },
    /// Tell every problem of a configuration.
    Check {
        /// The configuration; without it, the one that a sandbox would get.
        file: Option<PathBuf>,
    },
    /// Print what a sandbox would get.
    Resolve {
        /// The configuration; without it, the one that a sandbox would get.
        file: Option<PathBuf>,
    },
    /// Write the commented configuration of each hypervisor, and the page that explains every option.
    Generate {
        /// Where caisson will be installed.
        #[arg(long, default_value = "/usr")]
        prefix: PathBuf,
        /// An existing folder.
        folder: PathBuf,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Serve { idle_timeout } => serve(Duration::from_secs(idle_timeout)).await,
        Command::Generate { prefix, folder } => generate(&prefix, &folder).await,
        Command::Check { file } => resolve(file).await.map(|resolved| println!("{}: good", resolved.config.origin)),
        Command::Resolve { file } => resolve(file)
            .await
            .map(|resolved| print!("{}", protobuf::text_format::print_to_string_pretty(&resolved.config))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("caisson-config-service: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(idle_timeout: Duration) -> anyhow::Result<()> {
    log_to_stderr();
    // Leave the session of whoever started this. Fails for a leader, who has his own already.
    let _ = nix::unistd::setsid();
    let idle_timeout = (!idle_timeout.is_zero()).then_some(idle_timeout);
    let socket = inherited_socket().unwrap_or_else(paths::config_socket);
    let state_dir = socket.with_extension("kept");
    let configurations = Configurations::new(Resolver::new(Installation::of_this_program()), state_dir);
    let listener = listener(&socket)?;
    info!(socket = %socket.display(), "serving");
    service::serve(listener, configurations, idle_timeout).await?;
    Ok(())
}

/// `$RUST_LOG` says what is told, as `info,caisson_config_service=debug`.
fn log_to_stderr() {
    let wanted = env::var("RUST_LOG").ok().and_then(|wanted| wanted.parse().ok());
    let targets = wanted.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(lines.with_filter(targets)).init();
}

/// Where the socket lies that whoever started this made.
fn inherited_socket() -> Option<PathBuf> {
    let stdin = io::stdin().as_fd().try_clone_to_owned().ok()?;
    UnixListener::from(stdin).local_addr().ok()?.as_pathname().map(Path::to_owned)
}

/// The inherited socket, or one of our own when this was started by hand.
fn listener(socket: &Path) -> anyhow::Result<Listener> {
    match listen::inherited() {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            let listener =
                ConfigService::of_this_host().listen().with_context(|| format!("serve {}", socket.display()))?;
            listener.set_nonblocking(true)?;
            Ok(tokio::net::UnixListener::from_std(listener)?.into())
        }
        inherited => Ok(inherited?),
    }
}

async fn generate(prefix: &Path, folder: &Path) -> anyhow::Result<()> {
    let installation = Installation::of_this_program();
    let page = ("reference.md", reference::generate(&installation).await);
    for (name, text) in defaults::generate(&installation, prefix).await.into_iter().chain([page]) {
        let file = folder.join(name);
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

async fn resolve(file: Option<PathBuf>) -> anyhow::Result<Resolved> {
    let file = file.map(std::path::absolute).transpose()?;
    Ok(Resolver::new(Installation::of_this_program()).resolve(file.as_deref()).await?)
}
