use std::{
    io::{Read, pipe},
    process::Stdio,
};

use super::*;
use crate::{fake, options::MachineType};

/// A process that has said "no such luck" and goes on.
fn hanging() -> Process {
    let script = ["-c", "echo no such luck >&2; echo; exec sleep 1000"].map(str::to_owned);
    let (mut said, stdout) = pipe().unwrap();
    let streams = Streams { stdin: Stdio::null(), stdout: stdout.into() };
    let lifetime = Lifetime::of_launcher();
    let process = Process::start_with(Path::new("/bin/sh"), &script, Vec::new(), streams, &lifetime).unwrap();
    said.read_exact(&mut [0]).unwrap();
    process
}

fn qemu(qmp: Qmp) -> Qemu {
    Qemu {
        process: hanging(),
        qmp,
        console: Console::open(None, Audience::Nobody).unwrap().0,
        helpers: Mutex::default(),
        slots: Slots::new(MachineType::Q35, 0),
        sizes: Sizes::of(&VmConfig::default(), MachineType::Q35),
        run_dir: PathBuf::new(),
        unsaveable: None,
        known: KnownHelpers::default(),
        console_log: None,
    }
}

#[tokio::test]
async fn a_vm_that_qemu_has_stopped_ends_with_the_reason_and_qemus_last_words() {
    let mut status = ["running", "io-error"].into_iter();
    let qmp = fake::qmp(move |_, _| {
        vec![json!({ "return": { "status": status.next().unwrap() } }), json!({ "event": "STOP" })]
    });
    let exit = qemu(qmp).ended().await;
    assert_eq!(exit.reason, ExitReason::HYPERVISOR_FAILED.into());
    let why = "QEMU stopped the VM, since it could not read or write a disk (status \"io-error\"): no such luck";
    assert_eq!(exit.detail, why);
}

#[tokio::test]
async fn a_qemu_that_hangs_at_its_start_is_ended_and_told_with_its_last_words() {
    let (process, qmp) = (hanging(), fake::qmp(|_, _| vec![fake::refused("GenericError", "not now")]));
    let error = ready(&process, &qmp, None, &Helpers::default()).await.unwrap_err();
    assert_eq!(error.to_string(), "QEMU's qmp_capabilities: not now: no such luck");
}
