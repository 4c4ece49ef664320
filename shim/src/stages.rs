//! Where the time of a sandbox's start goes: one log line, which the bench reads.

use std::{
    fmt::Write,
    time::{Duration, Instant},
};

/// Durations by name, in the order in which they ended.
#[derive(Debug)]
pub struct Stages {
    last: Instant,
    text: String,
}

impl Stages {
    /// The first stage begins now.
    pub fn begin() -> Self {
        Self { last: Instant::now(), text: String::new() }
    }

    /// The stage `name` ends and the next begins.
    pub fn end(&mut self, name: &str) {
        let elapsed = self.last.elapsed();
        self.last = Instant::now();
        self.add(name, elapsed);
    }

    /// A stage that was measured elsewhere.
    pub fn add(&mut self, name: &str, duration: Duration) {
        let space = if self.text.is_empty() { "" } else { " " };
        let _ = write!(self.text, "{space}{name}={:.1}", duration.as_secs_f64() * 1000.0);
    }

    /// `name=milliseconds …`
    pub fn text(&self) -> &str {
        &self.text
    }
}
