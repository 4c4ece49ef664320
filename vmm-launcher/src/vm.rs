//! The VM's state machine: the only file that changes state. It holds no mechanics.
//!
//! ```text
//!           create            done         boot           pause
//!   Empty ─────────► Creating ────► Created ────► Running ◄────► Paused ◄── (restore: from Creating)
//!                        └───────────────► adopt: any of the three, as the VM is
//!     │ stop            │ stop, failure│ the VM ends │   resume     │
//!     └─────────────────┴──────────────┴─► Exited ◄──┴──────────────┘
//! ```
//!
//! A verb changes the state first, in one step, and does its slow work afterwards, without a lock. `stop` therefore never
//! waits for another verb. A verb whose work fails puts back the state it found, unless the VM has ended meanwhile.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use caisson_protocol::{
    processes::ProcessList,
    status::sentence,
    vmm::{CreateRequest, ExitReason, GuestDevice, RestoreRequest, VmState, WaitResponse},
};
use tokio::{sync::watch, task::spawn_blocking, time::timeout};
use tracing::{info, warn};

use crate::{
    Error, Result,
    console::{Audience, heard_before},
    hypervisor::{Adopted, Created, Hypervisor},
    outlive::{Keeper, Kept, Known},
    process::Ended,
    request,
};

/// A hypervisor that runs answers at once, unless the host is very busy.
const ADOPTION_LIMIT: Duration = Duration::from_secs(30);
/// A process that was killed may have much memory to give back.
const END_LIMIT: Duration = Duration::from_secs(5);

/// One VM, from nothing to its end.
#[derive(Debug)]
pub struct Vm<H> {
    state: Mutex<State<H>>,
    /// Set by the first `stop`.
    stopping: watch::Sender<bool>,
    /// Set when the VM has ended.
    exit: watch::Sender<Option<WaitResponse>>,
    /// Of a VM that outlives its launcher.
    keeper: Mutex<Option<Keeper>>,
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
    fn create(&mut self, verb: &'static str) -> Result<()> {
        *self = match self {
            Self::Empty => Self::Creating,
            Self::Creating | Self::Created(_) | Self::Running(_) | Self::Paused(_) | Self::Exited => {
                return Err(self.wrong(verb));
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
    /// Whether it goes on when its launcher is killed.
    pub outlives_launcher: bool,
}

/// What `adopt` answers.
#[derive(Debug)]
pub struct Found {
    /// Those that the VM was born with.
    pub devices: Vec<GuestDevice>,
    /// The hypervisor's process.
    pub pid: u32,
    /// As it is now.
    pub state: VmState,
}

impl<H: Hypervisor> Vm<H> {
    /// A VM that is only an idea.
    pub fn new() -> Arc<Self> {
        let (stopping, exit) = (watch::Sender::new(false), watch::Sender::new(None));
        Arc::new(Self { state: Mutex::new(State::Empty), stopping, exit, keeper: Mutex::new(None) })
    }

    /// Empty → Creating → Created. The work goes on when the caller loses interest; `stop` ends it.
    pub async fn create(self: &Arc<Self>, mut request: CreateRequest, audience: Audience) -> Result<Newborn> {
        self.lock().create("create")?;
        if H::OUTLIVES_LAUNCHER.is_err() {
            request.state_dir.clear();
        }
        if !request.state_dir.is_empty() {
            let keeper = Keeper::begin(Path::new(&request.state_dir), Path::new(&request.run_dir));
            *self.keeper() = Some(keeper.inspect_err(|_| *self.lock() = State::Empty)?);
        }
        let create = async move {
            request::prepare::<H>(request.vm.as_mut())?;
            H::create(&request, audience).await
        };
        self.make(create, State::Created).await
    }

    /// Empty → Creating → Created, Running or Paused: the VM of another launcher, as it is now. Or Exited, as it is.
    ///
    /// # Errors
    /// When there is none that can be trusted to be one; then nothing was touched. When the VM cannot be gone on with; then
    /// it has ended.
    pub async fn adopt(self: &Arc<Self>, state_dir: PathBuf) -> Result<Found> {
        if let Err(why) = H::OUTLIVES_LAUNCHER {
            return Err(Error::Unsupported(format!("a VM of {} cannot be adopted: {why}", H::NAME)));
        }
        self.lock().create("adopt")?;
        let known = || -> Result<(Kept, Option<Ended>)> {
            let kept = Kept::read::<H>(&state_dir)?;
            // An ended hypervisor answers nothing, but it may still say how it ended.
            let process = &kept.memory.process;
            let watch = format!("watch {} (pid {})", process.program.display(), process.id().pid);
            let ended = Ended::before(process).map_err(Error::host(watch))?;
            Ok((kept, ended))
        };
        let (kept, ended) = known().inspect_err(|_| *self.lock() = State::Empty)?;
        *self.keeper() = Some(Keeper::go_on(&state_dir, &kept));
        let vm = self.clone();
        // Goes on when the caller loses interest, as `create` does.
        let work = tokio::spawn(async move { vm.adopt_known(kept, ended, &state_dir).await });
        work.await.unwrap_or(Err(Error::Stopped))
    }

    async fn adopt_known(self: &Arc<Self>, kept: Kept, ended: Option<Ended>, state_dir: &Path) -> Result<Found> {
        let (devices, memory) = (kept.devices(), kept.memory);
        let (process, console_log) = (memory.process.clone(), memory.console_log.clone());
        let pid = process.id().pid;
        if let Some(ended) = ended {
            self.ended_unwatched(&process, &ended, console_log.as_deref(), state_dir).await;
            return Ok(Found { devices, pid, state: VmState::EXITED });
        }
        let adopted = tokio::select! {
            biased;
            () = self.stop_requested() => Err(Error::Stopped),
            adopted = timeout(ADOPTION_LIMIT, H::adopt(state_dir, memory)) => adopted.unwrap_or_else(|_| {
                let seconds = ADOPTION_LIMIT.as_secs();
                Err(Error::Hypervisor(format!("{} (pid {pid}) did not answer within {seconds} s", H::NAME)))
            }),
        };
        match adopted {
            Ok(Adopted { hypervisor, state }) => {
                let hypervisor = Arc::new(hypervisor);
                *self.lock() = match state {
                    VmState::CREATED => State::Created(hypervisor.clone()),
                    VmState::PAUSED => State::Paused(hypervisor.clone()),
                    _ => State::Running(hypervisor.clone()),
                };
                info!(pid, ?state, "VM adopted");
                if *self.stopping.borrow() {
                    hypervisor.kill();
                }
                tokio::spawn(self.clone().follow(hypervisor));
                Ok(Found { devices, pid, state })
            }
            Err(error) => {
                end_listed(state_dir).await;
                let (console_tail, _) = heard_before(console_log.as_deref());
                let detail = sentence(&error);
                self.exited(WaitResponse { console_tail, ..exit(ExitReason::HYPERVISOR_FAILED, detail) });
                Err(error)
            }
        }
    }

    /// The hypervisor ended while no launcher watched it.
    async fn ended_unwatched(&self, process: &Known, ended: &Ended, console_log: Option<&Path>, state_dir: &Path) {
        // Its helpers, if they are still there.
        end_listed(state_dir).await;
        let (console_tail, panic) = heard_before(console_log);
        let (reason, detail) = match panic {
            Some(words) => (ExitReason::GUEST_PANIC, format!("the guest kernel panicked: {words}")),
            None if ended.well() => {
                (ExitReason::GUEST_SHUTDOWN, "the guest ended its VM while no launcher watched it".into())
            }
            None => (ExitReason::HYPERVISOR_FAILED, ended.words(&process.program, process.id().pid)),
        };
        self.exited(WaitResponse { console_tail, ..exit(reason, detail) });
    }

    /// Has another launcher know of what has changed.
    pub fn remember(&self) {
        let Ok(hypervisor) = self.lock().alive("remember") else { return };
        if let Some(keeper) = &*self.keeper()
            && let Err(error) = keeper.write(&*hypervisor)
        {
            warn!(error = sentence(&error), "another launcher would not find the VM as it is now");
        }
    }

    /// Empty → Creating → Paused, as the snapshot was. As [`Self::create`] otherwise.
    pub async fn restore(self: &Arc<Self>, mut request: RestoreRequest, audience: Audience) -> Result<Newborn> {
        self.lock().create("create")?;
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
                let outlives_launcher = self.keeper().as_mut().map(|keeper| keeper.born_with(&devices)).is_some();
                *self.lock() = state(hypervisor.clone());
                info!(pid, "VM created");
                if *self.stopping.borrow() {
                    // `stop` came too late to be seen by the work, and too early to see the hypervisor.
                    hypervisor.kill();
                }
                self.remember();
                tokio::spawn(self.clone().follow(hypervisor));
                Ok(Newborn { devices, pid, outlives_launcher })
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
        if let Some(keeper) = self.keeper().take() {
            keeper.forget();
        }
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

    fn keeper(&self) -> MutexGuard<'_, Option<Keeper>> {
        self.keeper.lock().expect("no writer panics")
    }

    fn lock(&self) -> MutexGuard<'_, State<H>> {
        self.state.lock().expect("no transition panics")
    }
}

/// Ends by force what an earlier launcher has started, as far as it is still there.
async fn end_listed(state_dir: &Path) {
    let list = ProcessList::in_dir(state_dir);
    if let Ok(Err(error)) = spawn_blocking(move || list.end_all(END_LIMIT)).await {
        warn!(%error, "not all of the VM's processes could be ended");
    }
}

/// How a VM ended, without a console.
pub fn exit(reason: ExitReason, detail: String) -> WaitResponse {
    WaitResponse { reason: reason.into(), detail, ..Default::default() }
}

#[cfg(test)]
pub(crate) mod tests;
