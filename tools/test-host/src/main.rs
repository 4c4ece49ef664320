//! First process of the KVM test host: brings the machine up, executes one command, and tells how it ended. There is
//! no other service in it. Runs in the initrd, statically linked.

mod command;
mod interrupts;
mod port;
mod pulse;
mod sys;
mod system;

use std::thread;

use anyhow::{Context, Result};
use caisson_test_host::{Frame, Job, Verdict};

use interrupts::DeliveredOnce;
use port::Port;

fn main() {
    if let Err(error) = serve() {
        // The console is the only place left; the host shows its last lines.
        eprintln!("test host: {error:#}");
    }
    // The host ends the machine; the first process must not end before.
    loop {
        thread::park();
    }
}

fn serve() -> Result<()> {
    system::mount_kernel_filesystems()?;
    let arrivals = port::Arrivals::watch()?;
    system::load_modules()?;
    let mut port = Port::find(&arrivals)?;
    let job = port.receive_job()?;
    pulse::start(port.clone())?;
    let verdict = run(&job, &port).map_err(|error| format!("{error:#}"));
    port.send(&Frame::Exit(verdict)).context("tell the host how the command ended")
}

fn run(job: &Job, port: &Port) -> Result<u8> {
    let _interrupts = DeliveredOnce::new()?;
    system::enter_root(&job.shared)?;
    system::prepare()?;
    let verdict: Verdict = command::run(job, port)?;
    verdict.map_err(anyhow::Error::msg)
}
