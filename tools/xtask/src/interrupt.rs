//! Ctrl-C: virtual machines do not notice it by themselves.

use std::{process::exit, thread};

use caisson_testbed::Scope;
use nix::sys::signal::{SigSet, Signal};

/// From now on, an interrupted or terminated program ends what it has started before it ends.
pub fn clean_up_on_signals() {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    // Threads inherit the mask; programs that are executed do not.
    if let Err(error) = signals.thread_block() {
        eprintln!("warning: an interrupt will leave things behind: {error}");
        return;
    }
    thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        if let Err(error) = Scope::sweep_own() {
            eprintln!("error: clean up after {signal}: {error:#}");
        }
        exit(128 + signal as i32);
    });
}
