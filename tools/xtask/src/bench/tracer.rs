//! The kernel's tracer, Documentation/trace/ftrace.rst: what happened, to the microsecond.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

/// Where it is.
pub const TRACER: &str = "/sys/kernel/tracing";
/// Enough for some hundred thousand events.
const BUFFER_KIB: &str = "65536";

/// A tracer that traces; it stops with the value.
pub struct Tracer {
    events: &'static [&'static str],
}

impl Tracer {
    /// Begins with nothing, of all processes.
    pub fn start(events: &'static [&'static str]) -> Result<Self> {
        ensure!(Path::new(TRACER).join("trace").exists(), "no tracer at {TRACER}: mount -t tracefs tracefs {TRACER}");
        set("tracing_on", "0")?;
        set("trace_clock", "mono")?;
        set("buffer_size_kb", BUFFER_KIB)?;
        set("options/event-fork", "1")?;
        set("options/record-tgid", "1")?;
        set("set_event_pid", "")?;
        set("trace", "")?;
        let tracer = Self { events };
        for event in events {
            set(&format!("events/{event}/enable"), "1")?;
        }
        set("tracing_on", "1")?;
        Ok(tracer)
    }

    /// Writes a mark between the events.
    pub fn mark(&self, words: &str) -> Result<()> {
        set("trace_marker", words)
    }

    /// What happened.
    pub fn stop(self) -> Result<String> {
        set("tracing_on", "0")?;
        let path = Path::new(TRACER).join("trace");
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        for event in self.events {
            // It stays harmless when it stays on.
            set(&format!("events/{event}/enable"), "0").ok();
        }
    }
}

fn set(file: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACER).join(file);
    fs::write(&path, value).with_context(|| format!("write {}", path.display()))
}

/// Lines are `task-pid [cpu] flags seconds: event: details`. Answers milliseconds, event, details.
pub fn split(line: &str) -> Option<(f64, &str, &str)> {
    let mut parts = line.splitn(3, ": ");
    let seconds = parts.next()?.split_whitespace().last()?;
    Some((seconds.parse::<f64>().ok()? * 1000.0, parts.next()?, parts.next().unwrap_or_default()))
}
