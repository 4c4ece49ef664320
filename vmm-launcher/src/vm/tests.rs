//! The state machine with a hypervisor that does what its options say.

use std::{path::Path, pin::pin};

use caisson_protocol::vmm::CapabilitiesResponse;
use tokio::sync::Notify;

use super::*;
use crate::console::Console;

/// A hypervisor of words: `hang` while it is created, `fail` to be, `mute` when asked to power off, `stuck` when asked to
/// pause, and `late` too, which says so when it is told to.
#[derive(Debug)]
pub(crate) struct Fake {
    words: String,
    console: Console,
    end: Notify,
    /// It was asked to pause.
    pub(crate) asked: Notify,
    /// It is to answer.
    pub(crate) answer: Notify,
}

impl Hypervisor for Fake {
    const NAME: &'static str = "fake";
    const DEFAULT_PATH: &'static str = "/fake";

    fn options() -> serde_json::Value {
        serde_json::Value::Null
    }

    async fn capabilities(_: &Path, _: &str) -> Result<CapabilitiesResponse> {
        Ok(CapabilitiesResponse::default())
    }

    async fn create(request: &CreateRequest, audience: Audience) -> Result<Created<Self>> {
        match request.options.as_str() {
            "hang" => std::future::pending().await,
            "fail" => Err(Error::Hypervisor("no more VMs today".into())),
            words => {
                let (console, _) = Console::open(None, audience)?;
                let (end, asked, answer) = (Notify::new(), Notify::new(), Notify::new());
                let hypervisor = Self { words: words.into(), console, end, asked, answer };
                Ok(Created { hypervisor, devices: Vec::new() })
            }
        }
    }

    async fn boot(&self) -> Result<()> {
        Ok(())
    }

    async fn power_off(&self) -> Result<()> {
        if self.words != "mute" {
            self.end.notify_one();
        }
        Ok(())
    }

    fn kill(&self) {
        self.end.notify_one();
    }

    async fn ended(&self) -> WaitResponse {
        self.end.notified().await;
        exit(ExitReason::GUEST_SHUTDOWN, "the guest powered off".into())
    }

    fn pid(&self) -> u32 {
        1
    }

    fn console(&self) -> &Console {
        &self.console
    }

    async fn pause(&self) -> Result<()> {
        self.asked.notify_one();
        if self.words == "late" {
            self.answer.notified().await;
        }
        if matches!(self.words.as_str(), "stuck" | "late") { Err(Error::Hypervisor("stuck".into())) } else { Ok(()) }
    }

    async fn resume(&self) -> Result<()> {
        Ok(())
    }
}

fn request(words: &str) -> CreateRequest {
    CreateRequest { options: words.into(), ..Default::default() }
}

pub(crate) async fn created(words: &str) -> Arc<Vm<Fake>> {
    let vm = Vm::new();
    vm.create(request(words), Audience::Nobody).await.unwrap();
    vm
}

fn state(vm: &Vm<Fake>) -> VmState {
    vm.state().0
}

fn refusal(result: Result<()>) -> String {
    result.unwrap_err().to_string()
}

#[tokio::test]
async fn a_life_without_incidents_passes_every_state() {
    let vm = created("").await;
    assert_eq!(state(&vm), VmState::CREATED);
    vm.boot().await.unwrap();
    assert_eq!(state(&vm), VmState::RUNNING);
    vm.pause().await.unwrap();
    assert_eq!(state(&vm), VmState::PAUSED);
    vm.resume().await.unwrap();
    assert_eq!(state(&vm), VmState::RUNNING);
    vm.alive("end").unwrap().kill();
    assert_eq!(vm.wait().await.reason, ExitReason::GUEST_SHUTDOWN.into());
    assert_eq!(state(&vm), VmState::EXITED);
}

#[tokio::test]
async fn nothing_can_be_done_with_a_vm_that_is_not_created() {
    let vm = Vm::<Fake>::new();
    assert_eq!(refusal(vm.boot().await), "cannot boot a VM that is not created");
    assert_eq!(refusal(vm.pause().await), "cannot pause a VM that is not created");
    assert_eq!(refusal(vm.resume().await), "cannot resume a VM that is not created");
    assert!(vm.alive("measure").is_err());
}

#[tokio::test]
async fn a_vm_is_created_once() {
    let vm = created("").await;
    let twice = vm.create(request(""), Audience::Nobody).await.unwrap_err();
    assert_eq!(twice.to_string(), "cannot create a VM that is created but not booted");
}

#[tokio::test]
async fn a_vm_that_cannot_be_created_has_ended_and_says_why() {
    let vm = Vm::<Fake>::new();
    vm.create(request("fail"), Audience::Nobody).await.unwrap_err();
    let exit = vm.wait().await;
    assert_eq!((exit.reason, exit.detail.as_str()), (ExitReason::HYPERVISOR_FAILED.into(), "no more VMs today"));
    assert_eq!(state(&vm), VmState::EXITED);
}

#[tokio::test]
async fn stop_ends_a_create_that_hangs() {
    let vm = Vm::<Fake>::new();
    let mut create = pin!(vm.create(request("hang"), Audience::Nobody));
    let stop = async {
        while state(&vm) != VmState::CREATING {
            tokio::task::yield_now().await;
        }
        vm.stop(Duration::ZERO).await;
    };
    let (created, ()) = tokio::join!(create.as_mut(), stop);
    assert!(matches!(created, Err(Error::Stopped)));
    assert_eq!(vm.wait().await.reason, ExitReason::STOPPED.into());
}

#[tokio::test]
async fn a_caller_that_goes_away_does_not_end_a_create() {
    let vm = Vm::<Fake>::new();
    let mut create = Box::pin(vm.create(request(""), Audience::Nobody));
    let _ = std::future::poll_fn(|context| std::task::Poll::Ready(create.as_mut().poll(context))).await;
    drop(create);
    while state(&vm) != VmState::CREATED {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn stop_before_create_ends_everything() {
    let vm = Vm::<Fake>::new();
    vm.stop(Duration::ZERO).await;
    assert_eq!(vm.wait().await.reason, ExitReason::STOPPED.into());
    let late = vm.create(request(""), Audience::Nobody).await.unwrap_err();
    assert_eq!(late.to_string(), "cannot create a VM that is ended");
}

#[tokio::test]
async fn a_guest_that_obeys_within_its_grace_is_stopped() {
    let vm = created("").await;
    vm.boot().await.unwrap();
    vm.stop(Duration::from_secs(3600)).await;
    assert_eq!(vm.wait().await.reason, ExitReason::STOPPED.into());
}

#[tokio::test]
async fn a_guest_that_does_not_obey_is_stopped_all_the_same() {
    let vm = created("mute").await;
    vm.boot().await.unwrap();
    vm.stop(Duration::from_millis(1)).await;
    assert_eq!(vm.wait().await.reason, ExitReason::STOPPED.into());
}

#[tokio::test]
async fn stop_may_come_twice() {
    let vm = created("").await;
    tokio::join!(vm.stop(Duration::ZERO), vm.stop(Duration::ZERO));
    assert_eq!(state(&vm), VmState::EXITED);
}

#[tokio::test]
async fn a_pause_that_fails_leaves_the_vm_running() {
    let vm = created("stuck").await;
    vm.boot().await.unwrap();
    assert_eq!(refusal(vm.pause().await), "stuck");
    assert_eq!(state(&vm), VmState::RUNNING);
}
