//! Whether QEMU's VM runs, `query-status`: `RunState`, `qapi/run-state.json` of QEMU.

use caisson_protocol::vmm::VmState;
use caisson_vmm_launcher::{Error, Result, qmp::Qmp};
use serde_json::json;

/// The state of QEMU's VM.
///
/// # Errors
/// When it neither runs nor can be let run.
pub async fn state(qmp: &Qmp) -> Result<VmState> {
    let status = query(qmp).await?;
    match status.as_str() {
        "prelaunch" | "inmigrate" => Ok(VmState::CREATED),
        "running" | "suspended" => Ok(VmState::RUNNING),
        "paused" | "save-vm" | "finish-migrate" | "postmigrate" => Ok(VmState::PAUSED),
        status => Err(Error::Hypervisor(why_stopped(status))),
    }
}

/// # Errors
/// When the guest's processors stand still, in terms of `verb`.
pub async fn must_run(verb: &'static str, qmp: &Qmp) -> Result<()> {
    match state(qmp).await? {
        VmState::RUNNING => Ok(()),
        VmState::CREATED => Err(Error::WrongState { verb, state: "created but not booted" }),
        _ => Err(Error::WrongState { verb, state: "paused" }),
    }
}

/// Answers with the reason when QEMU has stopped its VM by itself, which then would wait for ever.
pub async fn stopped_by_itself(qmp: &Qmp) -> String {
    let mut events = qmp.events();
    loop {
        // A guest that panics ends QEMU, and one that was told to stop goes on when it is told.
        if let Ok(status) = query(qmp).await
            && ["internal-error", "io-error"].contains(&status.as_str())
        {
            return why_stopped(&status);
        }
        if qmp.next(&mut events, &["STOP"]).await.is_err() {
            // QEMU's end has reasons of its own.
            return std::future::pending().await;
        }
    }
}

async fn query(qmp: &Qmp) -> Result<String> {
    let told = qmp.execute("query-status", json!({})).await?;
    Ok(told["status"].as_str().unwrap_or_default().to_owned())
}

fn why_stopped(status: &str) -> String {
    let why = match status {
        "internal-error" => "it could not run a processor any further",
        "io-error" => "it could not read or write a disk",
        "guest-panicked" => "the guest's kernel panicked",
        "watchdog" => "the guest's watchdog ran out",
        _ => "it does not say why",
    };
    format!("QEMU stopped the VM, since {why} (status \"{}\")", status.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    /// What is told of a QEMU with `status`.
    async fn told(status: &'static str) -> Result<VmState, String> {
        let qmp = fake::qmp(move |_, _| vec![json!({ "return": { "status": status } })]);
        state(&qmp).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_vm_is_as_its_status_says() {
        assert_eq!(told("prelaunch").await, Ok(VmState::CREATED));
        assert_eq!(told("running").await, Ok(VmState::RUNNING));
        assert_eq!(told("paused").await, Ok(VmState::PAUSED));
        assert_eq!(told("postmigrate").await, Ok(VmState::PAUSED));
    }

    #[tokio::test]
    async fn a_vm_that_cannot_go_on_has_no_state() {
        let disk = "QEMU stopped the VM, since it could not read or write a disk (status \"io-error\")";
        assert_eq!(told("io-error").await, Err(disk.into()));
        let unknown = "QEMU stopped the VM, since it does not say why (status \"colo\")";
        assert_eq!(told("colo").await, Err(unknown.into()));
    }

    #[tokio::test]
    async fn a_stop_that_somebody_asked_for_is_none_by_itself() {
        let statuses = ["running", "paused", "running", "internal-error"];
        let mut statuses = statuses.into_iter();
        let qmp = fake::qmp(move |_, _| {
            vec![json!({ "return": { "status": statuses.next().unwrap() } }), json!({ "event": "STOP" })]
        });
        let why = stopped_by_itself(&qmp).await;
        assert!(why.ends_with("(status \"internal-error\")"), "{why}");
    }
}
