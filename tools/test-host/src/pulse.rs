//! Tells the host that this machine's clock goes on.

use std::thread;

use anyhow::{Context, Result};
use caisson_test_host::{Frame, PULSE};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::port::Port;

/// From now on, until the port is gone.
pub fn start(port: Port) -> Result<()> {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).context("make a timer")?;
    timer.set(Expiration::Interval(PULSE.into()), TimerSetTimeFlags::empty()).context("set the timer")?;
    thread::spawn(move || while timer.wait().is_ok() && port.send(&Frame::Pulse).is_ok() {});
    Ok(())
}
