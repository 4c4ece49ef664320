//! Ctrl-C: virtual machines do not notice it by themselves.

use std::{process::exit, thread};

use caisson_testbed::Scope;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

/// From now on, an interrupted or terminated program ends what it has started before it ends. By handlers and not by a
/// mask, which everything that is executed would inherit.
pub fn clean_up_on_signals() {
    let mut signals = match Signals::new([SIGINT, SIGTERM, SIGHUP]) {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("warning: an interrupt will leave things behind: {error}");
            return;
        }
    };
    thread::spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        if let Err(error) = Scope::sweep_own() {
            eprintln!("error: clean up after signal {signal}: {error:#}");
        }
        exit(128 + signal);
    });
}
