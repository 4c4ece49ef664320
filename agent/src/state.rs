//! The life of a process in a container. This is the only file that changes a state.
//!
//! ```text
//!              begin          made           run          pause
//! exec:  Added ─────► Starting ────► Created ────► Running ◄────► Paused
//! init:               (born so)         │             │    resume    │
//!                                       └──── exit ───┴──────────────┴──► Exited
//! ```

use nix::unistd::Pid;

use crate::{
    error::{Error, Result},
    reaper::Exit,
};

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Described, and nothing more.
    Added,
    /// Being made.
    Starting,
    /// Waits at its gate.
    Created(Pid),
    /// Runs its program.
    Running(Pid),
    /// Frozen with its container.
    Paused(Pid),
    /// Ended; the pid is history.
    Exited(Pid, Exit),
}

impl State {
    /// The process is about to be made.
    ///
    /// # Errors
    /// When that happened before.
    pub fn begin(&mut self) -> Result<()> {
        *self = match *self {
            Self::Added => Self::Starting,
            Self::Starting | Self::Created(_) | Self::Running(_) | Self::Paused(_) | Self::Exited(..) => {
                return Err(self.wrong("start"));
            }
        };
        Ok(())
    }

    /// It could not be made, and may be tried again.
    pub fn abandon(&mut self) {
        if *self == Self::Starting {
            *self = Self::Added;
        }
    }

    /// The process waits at its gate.
    pub fn made(&mut self, pid: Pid) {
        if *self == Self::Starting {
            *self = Self::Created(pid);
        }
    }

    /// Its gate is about to open.
    ///
    /// # Errors
    /// Unless it waits there.
    pub fn run(&mut self) -> Result<Pid> {
        let Self::Created(pid) = *self else { return Err(self.wrong("start")) };
        *self = Self::Running(pid);
        Ok(pid)
    }

    /// Its container is frozen.
    ///
    /// # Errors
    /// Unless it runs.
    pub fn pause(&mut self) -> Result<()> {
        let Self::Running(pid) = *self else { return Err(self.wrong("pause")) };
        *self = Self::Paused(pid);
        Ok(())
    }

    /// Its container goes on.
    ///
    /// # Errors
    /// Unless it is paused.
    pub fn resume(&mut self) -> Result<()> {
        let Self::Paused(pid) = *self else { return Err(self.wrong("resume")) };
        *self = Self::Running(pid);
        Ok(())
    }

    /// It ended.
    pub fn exit(&mut self, exit: Exit) {
        *self = match *self {
            Self::Created(pid) | Self::Running(pid) | Self::Paused(pid) => Self::Exited(pid, exit),
            Self::Added | Self::Starting | Self::Exited(..) => *self,
        };
    }

    /// The pid of a process that is there, or was.
    pub fn pid(&self) -> Option<Pid> {
        match *self {
            Self::Added | Self::Starting => None,
            Self::Created(pid) | Self::Running(pid) | Self::Paused(pid) | Self::Exited(pid, _) => Some(pid),
        }
    }

    /// Whom a signal goes to.
    ///
    /// # Errors
    /// When there is no process yet, or no more; the latter in the words that containerd knows from runc.
    pub fn signalled(&self) -> Result<Pid> {
        match *self {
            Self::Created(pid) | Self::Running(pid) | Self::Paused(pid) => Ok(pid),
            Self::Added | Self::Starting => Err(self.wrong("kill")),
            Self::Exited(..) => Err(Error::NotFound("process already finished".into())),
        }
    }

    /// How it ended, if it did.
    pub fn exited(&self) -> Option<Exit> {
        match *self {
            Self::Exited(_, exit) => Some(exit),
            Self::Added | Self::Starting | Self::Created(_) | Self::Running(_) | Self::Paused(_) => None,
        }
    }

    /// The refusal of `verb` in this state.
    pub fn wrong(&self, verb: &str) -> Error {
        let state = match self {
            Self::Added => "not started",
            Self::Starting => "being started",
            Self::Created(_) => "created",
            Self::Running(_) => "running",
            Self::Paused(_) => "paused",
            Self::Exited(..) => "stopped",
        };
        Error::WrongState(format!("cannot {verb} a process that is {state}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    const PID: Pid = Pid::from_raw(7);

    fn exit() -> Exit {
        Exit { status: 3, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn a_process_is_made_run_paused_resumed_and_ends() {
        let mut state = State::Added;
        state.begin().unwrap();
        state.made(PID);
        assert_eq!(state.run().unwrap(), PID);
        state.pause().unwrap();
        state.resume().unwrap();
        state.exit(exit());
        assert_eq!(state, State::Exited(PID, exit()));
    }

    #[test]
    fn a_running_process_cannot_be_started_again() {
        let error = State::Running(PID).run().unwrap_err().to_string();
        assert_eq!(error, "cannot start a process that is running");
    }

    #[test]
    fn an_ended_process_takes_no_signal() {
        let error = State::Exited(PID, exit()).signalled().unwrap_err();
        assert!(matches!(&error, Error::NotFound(words) if words == "process already finished"), "{error}");
    }

    #[test]
    fn the_first_end_counts() {
        let mut state = State::Exited(PID, exit());
        state.exit(Exit { status: 9, ..exit() });
        assert_eq!(state.exited().unwrap().status, 3);
    }

    #[test]
    fn a_process_that_could_not_be_made_may_be_tried_again() {
        let mut state = State::Starting;
        state.abandon();
        assert_eq!(state, State::Added);
    }
}
