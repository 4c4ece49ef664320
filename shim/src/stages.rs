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
        let elapsed = self.lap();
        self.add(name, elapsed);
    }

    /// A stage ends whose name, or whose parts, are known later.
    pub fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.last, now))
    }

    /// A stage that was measured before, or elsewhere.
    pub fn add(&mut self, name: &str, duration: Duration) {
        let space = if self.text.is_empty() { "" } else { " " };
        let _ = write!(self.text, "{space}{name}={:.1}", duration.as_secs_f64() * 1000.0);
    }

    /// `name=milliseconds …`
    pub fn text(&self) -> &str {
        &self.text
    }
}
