//! The config-service's program: `serve` for shims, `check` and `resolve` for people.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use caisson_config_service::{
    installation::Installation,
    resolve::{Resolved, Resolver},
    service,
};
use caisson_protocol::listen;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Turns configuration files into the checked configuration of a sandbox.
#[derive(Parser)]
#[command(name = "caisson-config-service", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve shims on the socket that is standard input.
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
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Serve { idle_timeout } => serve(Duration::from_secs(idle_timeout)).await,
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
    let filter = EnvFilter::builder().with_default_directive(tracing::Level::INFO.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    // Leave the session of whoever started this. Fails for a leader, who has his own already.
    let _ = nix::unistd::setsid();
    let idle_timeout = (!idle_timeout.is_zero()).then_some(idle_timeout);
    service::serve(listen::inherited()?, Installation::of_this_program(), idle_timeout).await?;
    Ok(())
}

async fn resolve(file: Option<PathBuf>) -> anyhow::Result<Resolved> {
    let file = file.map(std::path::absolute).transpose()?;
    Ok(Resolver::new(Installation::of_this_program()).resolve(file.as_deref()).await?)
}
