//! One process of a container as containerd knows it.
//!
//! ```text
//! Created ─begin_start─► Starting ─started─► Running ⇄ Paused
//!    └───────────────────────┴──── exited ─────┴────────┴──► Exited
//! ```
//!
//! An exit that arrives while the start is still under way is kept back until containerd has heard of the start.

use std::sync::Mutex;

use caisson_protocol::{containerd::types::task::Status as TaskStatus, guest::ProcessExited};
use tokio::sync::watch;

use crate::{
    Error, Result,
    stdio::{Paths, Stdio},
};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0-255, or 128 + signal.
    pub status: u32,
    /// Nanoseconds since 1970.
    pub at_unix_ns: i64,
}

impl Exit {
    /// Reads the guest's event; a status outside of a byte is the guest's invention.
    pub fn of(event: &ProcessExited) -> Self {
        Self { status: event.status & 0xff, at_unix_ns: event.exited_unix_ns }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Created,
    Starting { exit: Option<Exit> },
    Running,
    Paused,
    Exited(Exit),
}

/// A process, from its creation to its deletion.
#[derive(Debug)]
pub struct Process {
    /// containerd's names of the streams.
    pub paths: Paths,
    /// Whether it has a terminal.
    pub terminal: bool,
    phase: Mutex<Phase>,
    exit: watch::Sender<Option<Exit>>,
    stdio: Mutex<Option<Stdio>>,
}

impl Process {
    /// A process that has not started.
    pub fn new(paths: Paths, terminal: bool) -> Self {
        Self {
            paths,
            terminal,
            phase: Mutex::new(Phase::Created),
            exit: watch::Sender::new(None),
            stdio: Mutex::new(None),
        }
    }

    /// Start was asked for.
    pub fn begin_start(&self) -> Result<()> {
        self.change(|phase| match phase {
            Phase::Created => Ok(Phase::Starting { exit: None }),
            Phase::Starting { .. } | Phase::Running | Phase::Paused | Phase::Exited(_) => Err(phase.wrong("start")),
        })
    }

    /// The start failed: the process is as before.
    pub fn start_failed(&self) {
        let _ = self.change(|phase| match phase {
            Phase::Starting { exit: Some(exit) } => Ok(Phase::Exited(exit)),
            Phase::Starting { exit: None } => Ok(Phase::Created),
            Phase::Created | Phase::Running | Phase::Paused | Phase::Exited(_) => Ok(phase),
        });
    }

    /// The start succeeded; answers the exit that came meanwhile and can be told now.
    pub fn started(&self) -> Option<Exit> {
        let mut kept_back = None;
        let _ = self.change(|phase| match phase {
            Phase::Starting { exit: Some(exit) } => {
                kept_back = Some(exit);
                Ok(Phase::Exited(exit))
            }
            Phase::Starting { exit: None } => Ok(Phase::Running),
            Phase::Created | Phase::Running | Phase::Paused | Phase::Exited(_) => Ok(phase),
        });
        kept_back
    }

    /// The process has ended; answers whether that can be told now.
    pub fn exited(&self, exit: Exit) -> bool {
        let mut tell = false;
        let _ = self.change(|phase| match phase {
            Phase::Starting { .. } => Ok(Phase::Starting { exit: Some(exit) }),
            Phase::Created | Phase::Running | Phase::Paused => {
                tell = true;
                Ok(Phase::Exited(exit))
            }
            Phase::Exited(_) => Ok(phase),
        });
        tell
    }

    /// The container was frozen.
    pub fn paused(&self) -> Result<()> {
        self.change(|phase| match phase {
            Phase::Running => Ok(Phase::Paused),
            Phase::Created | Phase::Starting { .. } | Phase::Paused | Phase::Exited(_) => Err(phase.wrong("pause")),
        })
    }

    /// The container was thawed.
    pub fn resumed(&self) -> Result<()> {
        self.change(|phase| match phase {
            Phase::Paused => Ok(Phase::Running),
            Phase::Created | Phase::Starting { .. } | Phase::Running | Phase::Exited(_) => Err(phase.wrong("resume")),
        })
    }

    /// Whether it may be deleted: a process that never ran has nothing to wait for.
    pub fn check_deletable(&self) -> Result<()> {
        match self.phase() {
            Phase::Created | Phase::Exited(_) => Ok(()),
            phase @ (Phase::Starting { .. } | Phase::Running | Phase::Paused) => Err(phase.wrong("delete")),
        }
    }

    /// The exit, once it has been told.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Lets those who wait know.
    pub fn announce(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Exit {
        let mut exits = self.exit.subscribe();
        match exits.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The sender lives as long as `self`.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// In containerd's words.
    pub fn status(&self) -> TaskStatus {
        match self.phase() {
            Phase::Created | Phase::Starting { .. } => TaskStatus::CREATED,
            Phase::Running => TaskStatus::RUNNING,
            Phase::Paused => TaskStatus::PAUSED,
            Phase::Exited(_) => TaskStatus::STOPPED,
        }
    }

    /// Takes the streams in its care.
    pub fn keep_stdio(&self, stdio: Stdio) {
        *lock(&self.stdio) = Some(stdio);
    }

    /// Gives the streams away.
    pub fn take_stdio(&self) -> Option<Stdio> {
        lock(&self.stdio).take()
    }

    /// See [`Stdio::close_stdin`].
    pub fn close_stdin(&self) {
        if let Some(stdio) = lock(&self.stdio).as_mut() {
            stdio.close_stdin();
        }
    }

    fn phase(&self) -> Phase {
        *lock(&self.phase)
    }

    fn change(&self, next: impl FnOnce(Phase) -> Result<Phase>) -> Result<()> {
        let mut phase = lock(&self.phase);
        *phase = next(*phase)?;
        Ok(())
    }
}

impl Phase {
    fn wrong(self, verb: &'static str) -> Error {
        let state = match self {
            Self::Created => "created",
            Self::Starting { .. } => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exited(_) => "stopped",
        };
        Error::WrongState { verb, what: "process", state }
    }
}

/// No code panics while it holds one of this crate's locks, so a poisoned one is as good as any.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { status: 3, at_unix_ns: 5 };

    fn process() -> Process {
        Process::new(Paths::default(), false)
    }

    #[test]
    fn an_exit_during_the_start_is_told_after_it() {
        let process = process();
        process.begin_start().unwrap();
        assert!(!process.exited(EXIT));
        assert_eq!(process.started(), Some(EXIT));
        assert_eq!(process.status(), TaskStatus::STOPPED);
    }

    #[test]
    fn an_exit_is_told_once() {
        let process = process();
        process.begin_start().unwrap();
        assert_eq!(process.started(), None);
        assert!(process.exited(EXIT));
        assert!(!process.exited(Exit { status: 255, at_unix_ns: 6 }));
    }

    #[test]
    fn a_process_starts_once() {
        let process = process();
        process.begin_start().unwrap();
        process.started();
        let error = process.begin_start().unwrap_err().to_string();
        assert_eq!(error, "cannot start a process that is running");
    }

    #[test]
    fn a_failed_start_can_be_tried_again() {
        let process = process();
        process.begin_start().unwrap();
        process.start_failed();
        assert!(process.begin_start().is_ok());
    }

    #[test]
    fn a_running_process_is_not_deleted() {
        let process = process();
        assert!(process.check_deletable().is_ok());
        process.begin_start().unwrap();
        process.started();
        assert!(process.check_deletable().is_err());
        process.exited(EXIT);
        assert!(process.check_deletable().is_ok());
    }

    #[test]
    fn only_what_runs_is_paused() {
        let process = process();
        assert!(process.paused().is_err());
        process.begin_start().unwrap();
        process.started();
        process.paused().unwrap();
        assert_eq!(process.status(), TaskStatus::PAUSED);
        process.resumed().unwrap();
        assert_eq!(process.status(), TaskStatus::RUNNING);
    }

    #[tokio::test]
    async fn waiting_ends_with_the_announcement() {
        let process = process();
        process.exited(EXIT);
        process.announce(EXIT);
        assert_eq!(process.wait().await, EXIT);
    }
}
