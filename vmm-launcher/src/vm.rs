//! The VM's state machine: the only file that changes state. It holds no mechanics.
//!
//! ```text
//!           create            done         boot           pause
//!   Empty ─────────► Creating ────► Created ────► Running ◄────► Paused ◄── (restore: from Creating)
//!     │ stop            │ stop, failure│ the VM ends │   resume     │
//!     └─────────────────┴──────────────┴─► Exited ◄──┴──────────────┘
//! ```
//!
//! A verb changes the state first, in one step, and does its slow work afterwards, without a lock. `stop` therefore never
//! waits for another verb. A verb whose work fails puts back the state it found, unless the VM has ended meanwhile.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use caisson_protocol::{
    status::sentence,
    vmm::{CreateRequest, ExitReason, GuestDevice, RestoreRequest, VmState, WaitResponse},
};
use tokio::{sync::watch, time::timeout};
use tracing::{info, warn};

use crate::{
    Error, Result,
    console::Audience,
    hypervisor::{Created, Hypervisor},
    request,
};

/// One VM, from nothing to its end.
#[derive(Debug)]
pub struct Vm<H> {
    state: Mutex<State<H>>,
    /// Set by the first `stop`.
    stopping: watch::Sender<bool>,
    /// Set when the VM has ended.
    exit: watch::Sender<Option<WaitResponse>>,
}

#[derive(Debug)]
enum State<H> {
    Empty,
    Creating,
    Created(Arc<H>),
    Running(Arc<H>),
    Paused(Arc<H>),
    Exited,
}

impl<H> State<H> {
    fn create(&mut self) -> Result<()> {
        *self = match self {
            Self::Empty => Self::Creating,
            Self::Creating | Self::Created(_) | Self::Running(_) | Self::Paused(_) | Self::Exited => {
                return Err(self.wrong("create"));
            }
        };
        Ok(())
    }

    fn boot(&mut self) -> Result<Arc<H>> {
        let hypervisor = match self {
            Self::Created(hypervisor) => hypervisor.clone(),
            Self::Empty | Self::Creating | Self::Running(_) | Self::Paused(_) | Self::Exited => {
                return Err(self.wrong("boot"));
            }
        };
        *self = Self::Running(hypervisor.clone());
        Ok(hypervisor)
    }

    fn pause(&mut self) -> Result<Arc<H>> {
        let hypervisor = match self {
            Self::Running(hypervisor) => hypervisor.clone(),
            Self::Empty | Self::Creating | Self::Created(_) | Self::Paused(_) | Self::Exited => {
                return Err(self.wrong("pause"));
            }
        };
        *self = Self::Paused(hypervisor.clone());
        Ok(hypervisor)
    }

    fn resume(&mut self) -> Result<Arc<H>> {
        let hypervisor = match self {
            Self::Paused(hypervisor) => hypervisor.clone(),
            Self::Empty | Self::Creating | Self::Created(_) | Self::Running(_) | Self::Exited => {
                return Err(self.wrong("resume"));
            }
        };
        *self = Self::Running(hypervisor.clone());
        Ok(hypervisor)
    }

    fn stop(&mut self) -> Ending<H> {
        match self {
            Self::Empty => {
                *self = Self::Exited;
                Ending::Nothing
            }
            // `create` itself sees that it is to stop.
            Self::Creating | Self::Exited => Ending::UnderWay,
            // A guest whose vCPUs stand still cannot power itself off.
            Self::Created(hypervisor) | Self::Paused(hypervisor) => Ending::Force(hypervisor.clone()),
            Self::Running(hypervisor) => Ending::Grace(hypervisor.clone()),
        }
    }

    /// For verbs that change nothing here.
    fn alive(&self, verb: &'static str) -> Result<Arc<H>> {
        match self {
            Self::Created(hypervisor) | Self::Running(hypervisor) | Self::Paused(hypervisor) => Ok(hypervisor.clone()),
            Self::Empty | Self::Creating | Self::Exited => Err(self.wrong(verb)),
        }
    }

    fn wrong(&self, verb: &'static str) -> Error {
        let state = match self {
            Self::Empty => "not created",
            Self::Creating => "being created",
            Self::Created(_) => "created but not booted",
            Self::Running(_) => "running",
            Self::Paused(_) => "paused",
            Self::Exited => "ended",
        };
        Error::WrongState { verb, state }
    }
}

/// What `stop` has to do.
enum Ending<H> {
    Nothing,
    UnderWay,
    Force(Arc<H>),
    Grace(Arc<H>),
}

/// What `create` answers.
#[derive(Debug)]
pub struct Newborn {
    /// In the request's order.
    pub devices: Vec<GuestDevice>,
    /// The hypervisor's process.
    pub pid: u32,
}

impl<H: Hypervisor> Vm<H> {
    /// A VM that is only an idea.
    pub fn new() -> Arc<Self> {
        let (stopping, exit) = (watch::Sender::new(false), watch::Sender::new(None));
        Arc::new(Self { state: Mutex::new(State::Empty), stopping, exit })
    }

    /// Empty → Creating → Created. The work goes on when the caller loses interest; `stop` ends it.
    pub async fn create(self: &Arc<Self>, mut request: CreateRequest, audience: Audience) -> Result<Newborn> {
        self.lock().create()?;
        let create = async move {
            request::prepare::<H>(request.vm.as_mut())?;
            H::create(&request, audience).await
        };
        self.make(create, State::Created).await
    }

    /// Empty → Creating → Paused, as the snapshot was. As [`Self::create`] otherwise.
    pub async fn restore(self: &Arc<Self>, mut request: RestoreRequest, audience: Audience) -> Result<Newborn> {
        self.lock().create()?;
        let restore = async move {
            request::prepare::<H>(request.vm.as_mut())?;
            H::restore(&request, audience).await
        };
        self.make(restore, State::Paused).await
    }

    async fn make(
        self: &Arc<Self>,
        making: impl Future<Output = Result<Created<H>>> + Send + 'static,
        state: fn(Arc<H>) -> State<H>,
    ) -> Result<Newborn> {
        let vm = self.clone();
        let work = tokio::spawn(async move {
            let made = tokio::select! {
                biased;
                () = vm.stop_requested() => Err(Error::Stopped),
                made = making => made,
            };
            vm.made(made, state)
        });
        work.await.unwrap_or(Err(Error::Stopped))
    }

    fn made(self: &Arc<Self>, created: Result<Created<H>>, state: fn(Arc<H>) -> State<H>) -> Result<Newborn> {
        match created {
            Ok(Created { hypervisor, devices }) => {
                let hypervisor = Arc::new(hypervisor);
                let pid = hypervisor.pid();
                *self.lock() = state(hypervisor.clone());
                info!(pid, "VM created");
                if *self.stopping.borrow() {
                    // `stop` came too late to be seen by the work, and too early to see the hypervisor.
                    hypervisor.kill();
                }
                tokio::spawn(self.clone().follow(hypervisor));
                Ok(Newborn { devices, pid })
            }
            Err(error) => {
                self.exited(exit(ExitReason::HYPERVISOR_FAILED, sentence(&error)));
                Err(error)
            }
        }
    }

    /// Created → Running.
    pub async fn boot(&self) -> Result<()> {
        let hypervisor = self.lock().boot()?;
        let booted = hypervisor.boot().await;
        self.undo_failed(booted, State::Created(hypervisor))
    }

    /// Running → Paused.
    pub async fn pause(&self) -> Result<()> {
        let hypervisor = self.lock().pause()?;
        let paused = hypervisor.pause().await;
        self.undo_failed(paused, State::Running(hypervisor))
    }

    /// Paused → Running.
    pub async fn resume(&self) -> Result<()> {
        let hypervisor = self.lock().resume()?;
        let resumed = hypervisor.resume().await;
        self.undo_failed(resumed, State::Paused(hypervisor))
    }

    /// Whatever it is → Exited, and answers when it is. A running guest gets `grace` to power itself off.
    pub async fn stop(&self, grace: Duration) {
        self.stopping.send_replace(true);
        let ending = self.lock().stop();
        match ending {
            Ending::Nothing => self.exited(WaitResponse::default()),
            Ending::UnderWay => {}
            Ending::Force(hypervisor) => hypervisor.kill(),
            Ending::Grace(hypervisor) => {
                if !grace.is_zero() && timeout(grace, self.power_off(&hypervisor)).await.is_err() {
                    info!(?grace, "the guest did not power off in time and is ended by force");
                }
                hypervisor.kill();
            }
        }
        self.wait().await;
    }

    /// Answers when the VM has ended.
    pub async fn wait(&self) -> WaitResponse {
        let mut exit = self.exit.subscribe();
        exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone()).unwrap_or_default()
    }

    /// The hypervisor, for verbs that change nothing here: created, running or paused.
    ///
    /// # Errors
    /// When there is none, in terms of `verb`.
    pub fn alive(&self, verb: &'static str) -> Result<Arc<H>> {
        self.lock().alive(verb)
    }

    /// The state by its name in the contract, and how it ended if it did.
    pub fn state(&self) -> (VmState, Option<WaitResponse>) {
        let state = match &*self.lock() {
            State::Empty => VmState::EMPTY,
            State::Creating => VmState::CREATING,
            State::Created(_) => VmState::CREATED,
            State::Running(_) => VmState::RUNNING,
            State::Paused(_) => VmState::PAUSED,
            State::Exited => VmState::EXITED,
        };
        (state, self.exit.borrow().clone())
    }

    async fn stop_requested(&self) {
        let mut stopping = self.stopping.subscribe();
        // `self` holds the sender: this does not fail.
        let _ = stopping.wait_for(|stopping| *stopping).await;
    }

    /// Waits for the end after the guest was asked; returns at once when it cannot be asked.
    async fn power_off(&self, hypervisor: &H) {
        match hypervisor.power_off().await {
            Ok(()) => drop(self.wait().await),
            Err(error) => warn!(error = sentence(&error), "the guest cannot be asked to power off"),
        }
    }

    /// One task per VM: the end has one way in, however it came.
    async fn follow(self: Arc<Self>, hypervisor: Arc<H>) {
        let exit = hypervisor.ended().await;
        self.exited(exit);
    }

    fn exited(&self, mut exit: WaitResponse) {
        if *self.stopping.borrow() {
            exit.reason = ExitReason::STOPPED.into();
            exit.detail = "the VM was stopped".into();
        }
        info!(reason = ?exit.reason, detail = exit.detail, "VM ended");
        *self.lock() = State::Exited;
        self.exit.send_replace(Some(exit));
    }

    fn undo_failed(&self, done: Result<()>, before: State<H>) -> Result<()> {
        if done.is_err() {
            let mut state = self.lock();
            if !matches!(*state, State::Exited) {
                *state = before;
            }
        }
        done
    }

    fn lock(&self) -> MutexGuard<'_, State<H>> {
        self.state.lock().expect("no transition panics")
    }
}

/// How a VM ended, without a console.
pub fn exit(reason: ExitReason, detail: String) -> WaitResponse {
    WaitResponse { reason: reason.into(), detail, ..Default::default() }
}

#[cfg(test)]
mod tests;
