//! One boot by the clock, and the memory that it takes.

use std::{
    io::Read,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use caisson_testbed::Capture;
use nix::pty::PtyMaster;
use procfs::process::Process;

use super::{guest::SIGN, hypervisor::Candidate};
use crate::bench::memory::proportional_set_size;

/// Far above what any hypervisor takes that boots the guest at all.
const LIMIT: Duration = Duration::from_secs(60);

/// What one boot took.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// From exec to the first process's first words.
    pub exec_to_init: Duration,
    /// Resident in mappings that are not the guest's memory, in bytes.
    pub outside_guest: u64,
    /// Proportional set size, the guest's memory included, in bytes.
    pub proportional: u64,
}

/// Boots the guest and ends it.
pub fn boot(candidate: &Candidate, memory_mib: u64) -> Result<Timing> {
    let started = Instant::now();
    let running = Running::start(candidate.command(None)?)?;
    let exec_to_init = running.wait_for_init()? - started;
    let process = Process::new(running.child.id().cast_signed()).context("look at the hypervisor")?;
    Ok(Timing {
        exec_to_init,
        outside_guest: outside_guest(&process, memory_mib << 20)?,
        proportional: proportional_set_size(&process)?,
    })
}

/// A hypervisor with a guest; ends with the value.
pub struct Running {
    child: Child,
    console: std::sync::Arc<Capture>,
    complaints: std::sync::Arc<Capture>,
}

impl Running {
    /// Starts it, with its console on the terminal, if there is one.
    pub fn start((mut command, terminal): (Command, Option<PtyMaster>)) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("execute {}", command.get_program().display()))?;
        let capture = |stream: Option<Box<dyn Read + Send>>| stream.map_or_else(Capture::empty, Capture::of);
        let stdout = child.stdout.take().map(|stream| Box::new(stream) as _);
        let console = capture(terminal.map(|terminal| Box::new(terminal) as _).or(stdout));
        let complaints = capture(child.stderr.take().map(|stream| Box::new(stream) as _));
        Ok(Self { child, console, complaints })
    }

    /// Waits for the sign of the first process and tells when it came.
    pub fn wait_for_init(&self) -> Result<Instant> {
        let line = self.console.wait_for_nth(SIGN, 1, LIMIT);
        Ok(line.with_context(|| format!("standard error: {}", self.complaints.text()))?.at)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The guest's memory is in the mappings that are as large as it.
fn outside_guest(process: &Process, guest_bytes: u64) -> Result<u64> {
    let maps = process.smaps().context("read the hypervisor's mappings")?;
    let other = maps.iter().filter(|map| map.address.1 - map.address.0 < guest_bytes);
    Ok(other.filter_map(|map| map.extension.map.get("Rss")).sum())
}
