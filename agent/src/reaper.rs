//! Collects every child that ends, and tells whoever waits for it. Orphans that nobody waits for are collected too.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::SystemTime,
};

use nix::unistd::Pid;
use rustix::{
    io::Errno,
    process::{WaitOptions, wait},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// What it exited with, 0-255, or 128 + the signal that ended it: as a shell counts.
    pub status: u32,
    /// When the agent collected it.
    pub at: SystemTime,
}

/// The one place that waits for children.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<HashMap<Pid, oneshot::Sender<Exit>>>>);

impl Reaper {
    /// Starts to collect.
    ///
    /// # Errors
    /// When the process can have no signal handler.
    pub fn start() -> io::Result<Self> {
        let mut ended = signal(SignalKind::child())?;
        let reaper = Self::default();
        let collecting = reaper.clone();
        tokio::spawn(async move {
            while ended.recv().await.is_some() {
                collecting.collect();
            }
        });
        Ok(reaper)
    }

    /// The end of child `pid`. To be called before this thread gives way to the collector: at once after the child was
    /// made, or while something keeps the child from becoming this process's own.
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (told, end) = oneshot::channel();
        self.watched().insert(pid, told);
        end
    }

    fn collect(&self) {
        loop {
            let (pid, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some(ended)) => ended,
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "children cannot be collected");
                    return;
                }
            };
            let pid = Pid::from_raw(pid.as_raw_pid());
            let signal = status.terminating_signal().map(|signal| 128 + signal);
            let status = status.exit_status().or(signal).unwrap_or_default().cast_unsigned();
            if let Some(told) = self.watched().remove(&pid) {
                // Nobody listens any more when the request that asked was cut off.
                let _ = told.send(Exit { status, at: SystemTime::now() });
            }
        }
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, HashMap<Pid, oneshot::Sender<Exit>>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[expect(clippy::zombie_processes, reason = "the reaper is there to wait")]
    async fn end_of(script: &str) -> u32 {
        let reaper = Reaper::start().unwrap();
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        reaper.watch(Pid::from_raw(child.id() as i32)).await.unwrap().status
    }

    #[tokio::test]
    async fn a_status_is_told_as_it_is() {
        assert_eq!(end_of("exit 42").await, 42);
    }

    #[tokio::test]
    async fn a_signal_counts_from_128() {
        assert_eq!(end_of("kill -9 $$").await, 137);
    }

    #[tokio::test]
    async fn a_real_time_signal_counts_too() {
        assert_eq!(end_of("kill -37 $$").await, 165);
    }
}
