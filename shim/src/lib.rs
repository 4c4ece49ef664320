//! containerd's shim for sandboxes in virtual machines.
//!
//! One process per pod. `start` makes it, containerd drives it through the Task service, `delete` removes what it left
//! when it could not do so itself. Everything that a sandbox has on the host lies in one directory
//! ([`caisson_protocol::paths::SandboxDir`]), so that removing the sandbox is: stop the launcher, unmount, remove.

mod cli;
mod delete;
mod serve;
mod start;

mod block;
mod bundle;
mod console;
mod container;
mod copies;
mod error;
mod events;
mod files;
mod guest_spec;
mod hooks;
mod launcher;
mod mount;
mod process;
mod record;
mod sandbox;
mod sandbox_service;
mod share;
mod stages;
mod stdio;
mod task_service;
mod vm;
mod vm_request;

use std::process::ExitCode;

use caisson_protocol::status::sentence;

pub(crate) use error::{Error, Result};

/// The program: reads the command line that containerd wrote and does what it says.
pub fn run() -> ExitCode {
    let outcome = match cli::parse(std::env::args().skip(1)) {
        Ok(cli::Command::Version) => {
            println!("containerd-shim-caisson-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Ok(cli::Command::Info) => start::print_info(),
        Ok(cli::Command::Start(flags)) => start::start(&flags),
        Ok(cli::Command::Delete(flags)) => delete::delete(&flags),
        Ok(cli::Command::Serve(flags)) => serve::serve(&flags),
        Err(error) => Err(error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows a failed start's standard error to its caller.
            eprintln!("{}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}
