//! One `ctr` command against a private containerd.

use std::{process::Command, time::Duration};

use anyhow::Result;

use crate::{Outcome, Session};

/// Far above what anything takes that works.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// A command that has not been started yet.
#[derive(Debug)]
#[must_use = "does nothing until it is run"]
pub struct Ctr {
    command: Command,
    input: Vec<u8>,
    limit: Duration,
}

impl Ctr {
    pub(crate) fn new(command: Command) -> Self {
        Self { command, input: Vec::new(), limit: DEFAULT_LIMIT }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<str>) -> Self {
        self.command.arg(argument.as_ref());
        self
    }

    /// Adds several.
    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// What [`Self::run`] writes to standard input before closing it.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// How long [`Self::run`] waits: one minute unless told.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot be executed or takes too long; not when it fails, which is an [`Outcome`].
    pub fn run(self) -> Result<Outcome> {
        let mut session = Session::start(self.command)?;
        session.feed(self.input);
        session.wait(self.limit)
    }

    /// Starts it with pipes.
    ///
    /// # Errors
    /// When it cannot be executed.
    pub fn start(self) -> Result<Session> {
        Session::start(self.command)
    }

    /// Starts it on a terminal.
    ///
    /// # Errors
    /// When it cannot be executed.
    pub fn start_on_terminal(self, rows: u16, columns: u16) -> Result<Session> {
        Session::start_on_terminal(self.command, rows, columns)
    }
}
