//! PID 1 of the guest: boots it, calls the host, and runs containers for it until the host goes.
//!
//! ```text
//! boot ─► modules ─► host ─┬─► task_service  ─► containers ─► container ─► process ─► launch ┄► maker ─► program
//!                          └─► guest_service ─► storage, network, machine, files, console, metrics
//! ```
//! The program is also its own helper: `maker` makes a container's process, `console` becomes a shell.

mod boot;
mod cgroup;
mod cmdline;
mod console;
mod container;
mod containers;
mod device_filter;
mod error;
mod events;
mod files;
mod guest_service;
mod home;
mod host;
mod launch;
mod machine;
mod maker;
mod metrics;
mod modules;
mod mounts;
mod network;
mod process;
mod program;
mod reaper;
mod resources;
mod spec;
mod state;
mod stats;
mod storage;
mod streams;
mod sys;
mod task_service;
mod uevents;

use std::{env, process::ExitCode, sync::Arc, time::Duration};

use caisson_protocol::status::sentence;
use cmdline::Parameters;
use containers::Containers;
use error::{Attempt, Result};
use guest_service::GuestService;
use network::Network;
use reaper::Reaper;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.split_first() {
        Some((role, rest)) if role == launch::MAKER => maker::run(rest),
        Some((role, rest)) if role == console::CONSOLE => console::become_shell(rest),
        _ if std::process::id() == 1 => run_guest(),
        _ => {
            eprintln!("caisson-agent is the first program of a guest; it does nothing elsewhere");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// The guest's whole life.
fn run_guest() {
    let kernel_time = boot::since_start();
    sys::return_large_buffers();
    let parameters = match boot::prepare() {
        Ok(parameters) => parameters,
        Err(error) => return fail(Parameters::read(), &error),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let lived =
        runtime.attempt("start the runtime").and_then(|runtime| runtime.block_on(live(parameters, kernel_time)));
    match lived {
        Ok(()) => {
            tracing::info!("the host has gone");
            cgroup::kill_all();
            boot::end(parameters.end);
        }
        Err(error) => fail(parameters, &error),
    }
}

async fn live(parameters: Parameters, kernel_time: Duration) -> Result<()> {
    let containers = Arc::new(Containers::new(Reaper::start().attempt("watch for children")?));
    let network = Network::open()?;
    network.loopback_up().await?;
    let connection = host::call().await?;
    let agent_time = boot::since_start().saturating_sub(kernel_time);
    tracing::info!(?kernel_time, ?agent_time, "the host answers");
    let is_set_up = false.into();
    host::serve(connection, GuestService { containers, parameters, network, kernel_time, agent_time, is_set_up }).await
}

fn fail(parameters: Parameters, error: &error::Error) {
    boot::say(&format!("caisson-agent failed: {}", sentence(error)));
    boot::end(parameters.end);
}
