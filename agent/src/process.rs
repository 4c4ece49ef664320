//! One process of a container: its state, its streams, and how it is told.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use caisson_protocol::guest::{Event, ProcessExited};
use nix::{errno::Errno, unistd::Pid};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    error::{Attempt, Result},
    events::Events,
    launch::{self, Made, Order},
    reaper::{Exit, Reaper},
    state::State,
    streams::{Connections, Ends, Streams},
    sys,
};

/// How long output may take to leave after the process ended.
const OUTPUT_LIMIT: Duration = Duration::from_secs(5);

/// Where a process's streams go: addresses, or nothing.
#[derive(Clone, Debug, Default)]
pub struct Stdio {
    /// Where its input comes from.
    pub stdin: String,
    /// Where its output goes.
    pub stdout: String,
    /// Where its errors go; unused with a terminal.
    pub stderr: String,
    /// Whether it gets a terminal.
    pub terminal: bool,
}

/// One process of a container.
pub struct Process {
    container_id: String,
    /// Empty for the container's first process.
    exec_id: String,
    /// Where its streams go.
    pub stdio: Stdio,
    gate: PathBuf,
    state: watch::Sender<State>,
    streams: Mutex<Streams>,
}

impl Process {
    /// A process that is being made (`State::Starting`) or will be (`State::Added`).
    pub fn new(container_id: &str, exec_id: &str, stdio: Stdio, gate: PathBuf, state: State) -> Arc<Self> {
        Arc::new(Self {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdio,
            gate,
            state: watch::Sender::new(state),
            streams: Mutex::default(),
        })
    }

    /// Where its gate is.
    pub fn gate(&self) -> &PathBuf {
        &self.gate
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Changes the state as `verb` says.
    ///
    /// # Errors
    /// `verb`'s own.
    pub fn change<T>(&self, verb: impl FnOnce(&mut State) -> T) -> T {
        let mut answer = None;
        self.state.send_modify(|state| answer = Some(verb(state)));
        answer.expect("send_modify calls its closure")
    }

    /// Has the process made, with its streams. It waits at its gate afterwards.
    ///
    /// # Errors
    /// When it cannot be; nothing of it is left then.
    pub async fn make(self: &Arc<Self>, reaper: &Reaper, events: &Events, order: &Order) -> Result<Pid> {
        let stdio = &self.stdio;
        let stderr = if stdio.terminal { "" } else { &stdio.stderr };
        let connections = Connections::dial(&stdio.stdin, &stdio.stdout, stderr).await?;
        let Made { pid, end, .. } = if stdio.terminal {
            let mut made = launch::make(reaper, order, Ends::null()).await?;
            if let Some(master) = made.terminal.take() {
                let streams = connections.into_terminal(master)?;
                if let Some((columns, rows)) = made.console_size {
                    streams.resize(columns, rows)?;
                }
                *self.streams() = streams;
            }
            made
        } else {
            let (ends, streams) = connections.into_pipes()?;
            let made = launch::make(reaper, order, ends).await?;
            *self.streams() = streams;
            made
        };
        self.change(|state| state.made(pid));
        tokio::spawn(self.clone().tell_end(end, events.clone()));
        Ok(pid)
    }

    /// Opens the gate.
    ///
    /// # Errors
    /// Unless the process waits there.
    pub async fn start(&self) -> Result<Pid> {
        let pid = self.change(State::run)?;
        launch::open_gate(&self.gate).await?;
        let _ = std::fs::remove_file(&self.gate);
        Ok(pid)
    }

    /// Sends one signal.
    ///
    /// # Errors
    /// When there is no process to take it.
    pub fn kill(&self, signal: i32) -> Result<()> {
        let pid = self.state().signalled()?;
        match sys::kill(pid, signal) {
            Err(Errno::ESRCH) => Err(crate::error::Error::NotFound("process already finished".into())),
            sent => sent.attempt(format_args!("send signal {signal} to process {pid}")),
        }
    }

    /// Waits for the end, however long it takes.
    pub async fn wait(&self) -> Option<Exit> {
        let mut state = self.state.subscribe();
        state.wait_for(|state| state.exited().is_some()).await.ok().and_then(|state| state.exited())
    }

    /// Waits until all output has left, or whoever holds it open had time enough.
    pub async fn drain(&self) {
        let outputs = self.streams().take_outputs();
        let aborts: Vec<_> = outputs.iter().map(tokio::task::JoinHandle::abort_handle).collect();
        if timeout(OUTPUT_LIMIT, futures_util::future::join_all(outputs)).await.is_err() {
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
        *self.streams() = Streams::default();
    }

    /// Sets its terminal's size.
    ///
    /// # Errors
    /// When it has none.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        self.streams().resize(columns, rows)
    }

    async fn tell_end(self: Arc<Self>, end: oneshot::Receiver<Exit>, events: Events) {
        let Ok(exit) = end.await else { return };
        let pid = self.state().pid().map_or(0, |pid| pid.as_raw().cast_unsigned());
        self.change(|state| state.exit(exit));
        tracing::debug!(container = self.container_id, exec = self.exec_id, pid, exit.status, "process ended");
        let mut event = Event::new();
        event.set_process_exited(ProcessExited {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            pid,
            status: exit.status,
            exited_unix_ns: exit.at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64),
            ..Default::default()
        });
        events.push(event);
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
