//! What a hypervisor can do is asked of the one that is installed, and no process is left of the questions.

use std::{fs, os::unix::fs::PermissionsExt};

use caisson_protocol::{
    deadline,
    status::{Code, Status},
    vmm::{CapabilitiesRequest, CapabilitiesResponse},
};
use tokio::process::Command;

use crate::fixture::{Backend, LIMIT, Launcher, children, for_backend, text};

for_backend!(
    qemu,
    Qemu,
    another_program_is_none,
    one_that_ends_when_it_is_asked_is_told,
    one_that_hangs_is_told,
    what_can_be_done_depends_on_the_machine,
    a_machine_that_does_not_exist_can_do_nothing,
    the_command_line_tells_the_same
);
for_backend!(
    cloud_hypervisor,
    CloudHypervisor,
    an_installed_one_tells_what_it_can_do,
    another_program_is_none,
    one_that_ends_when_it_is_asked_is_told
);
for_backend!(
    firecracker,
    Firecracker,
    an_installed_one_tells_what_it_can_do,
    another_program_is_none,
    one_that_ends_when_it_is_asked_is_told
);
for_backend!(
    stratovirt,
    StratoVirt,
    an_installed_one_tells_what_it_can_do,
    another_program_is_none,
    one_that_ends_when_it_is_asked_is_told
);

async fn ask(launcher: &Launcher, path: &str) -> Result<CapabilitiesResponse, Status> {
    ask_about(launcher, path, "").await
}

async fn ask_about(launcher: &Launcher, path: &str, options: &str) -> Result<CapabilitiesResponse, Status> {
    let request = CapabilitiesRequest { hypervisor_path: path.into(), options: options.into(), ..Default::default() };
    let told = launcher.client.capabilities(deadline(LIMIT), &request).await.map_err(Status::from);
    assert_eq!(children(launcher.child.id().unwrap()), Vec::<u32>::new());
    told
}

/// A program that says it is `backend`'s, and then does what `script` says.
async fn ask_an_impostor(backend: Backend, script: &str) -> Status {
    let launcher = Launcher::start(backend).await;
    let path = launcher.dir.path().join("impostor");
    let said = match backend {
        Backend::Qemu => "QEMU emulator version 1.0",
        Backend::CloudHypervisor => "cloud-hypervisor v1.0",
        Backend::Firecracker => "Firecracker v1.99.0",
        Backend::StratoVirt => "StratoVirt 1.0",
        Backend::Builtin => unreachable!("it is no other program"),
    };
    fs::write(&path, format!("#!/bin/sh\ncase $1 in -version|--version) echo {said}; exit;; esac\n{script}\n"))
        .unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    ask(&launcher, &text(&path)).await.unwrap_err()
}

/// Of versions as they are tested with.
async fn an_installed_one_tells_what_it_can_do(backend: Backend) {
    let launcher = Launcher::start(backend).await;
    let able = ask(&launcher, &backend.hypervisor().unwrap()).await.unwrap();
    let (devices, hotplug, operations): (&[&str], &[&str], &[&str]) = match backend {
        Backend::CloudHypervisor => (
            &["block", "net", "vsock", "fs", "pmem", "balloon", "rng", "console"],
            &["block", "net", "fs", "pmem"],
            &["pause", "snapshot", "resize-vcpus", "resize-memory", "resize-balloon", "adopt"],
        ),
        Backend::Firecracker => (
            &["block", "net", "vsock", "pmem", "balloon", "rng", "console"],
            &["block"],
            &["pause", "snapshot", "resize-balloon", "resize-memory", "adopt"],
        ),
        Backend::StratoVirt => {
            (&["block", "net", "vsock", "fs", "balloon", "rng", "console"], &["block"], &["resize-balloon", "adopt"])
        }
        Backend::Qemu | Backend::Builtin => unreachable!("they have tests of their own"),
    };
    // With an IOMMU there are devices of the host, too.
    let without_vfio = |list: &[String]| list.iter().filter(|word| *word != "vfio").cloned().collect::<Vec<_>>();
    assert_eq!(without_vfio(&able.devices), devices, "{able}");
    assert_eq!(without_vfio(&able.hotplug), hotplug, "{able}");
    assert_eq!(able.operations, operations, "{able}");
    assert_eq!(able.accelerator, "kvm", "{able}");
}

const Q35: &str = "machine_type = \"q35\"";

async fn what_can_be_done_depends_on_the_machine(backend: Backend) {
    let launcher = Launcher::start(backend).await;
    let of = async |options: &str| {
        let mut able = ask_about(&launcher, "", &format!("{}\n{options}", backend.options())).await.unwrap();
        // With an IOMMU it is another one.
        able.hotplug.retain(|kind| kind != "vfio");
        able
    };
    let (microvm, q35) = (of("").await, of(Q35).await);
    assert_eq!(microvm.operations, ["pause", "snapshot", "resize-balloon", "adopt"]);
    assert_eq!(q35.operations, ["pause", "snapshot", "resize-balloon", "resize-vcpus", "resize-memory", "adopt"]);
    assert_eq!((microvm.hotplug, q35.hotplug), (vec![], vec!["block".to_owned(), "net".to_owned()]));
    assert!(microvm.missing["resize-vcpus"].contains("q35"));
    assert!(!q35.missing.values().any(|why| why.contains("microvm")), "{:?}", q35.missing);
    assert!(q35.devices.contains(&"pmem".to_owned()), "{:?}", q35.devices);
    assert_eq!(q35.hypervisor_path, "/usr/bin/qemu-system-x86_64");
}

async fn a_machine_that_does_not_exist_can_do_nothing(backend: Backend) {
    let launcher = Launcher::start(backend).await;
    let status = ask_about(&launcher, "", "machine_type = \"pc\"").await.unwrap_err();
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.contains("expected `microvm` or `q35`"), "{status}");
}

async fn the_command_line_tells_the_same(backend: Backend) {
    let mut command = Command::new(backend.launcher());
    let output = command.args(["capabilities", "--json", "--options", Q35]).output().await.unwrap();
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(told["operations"].as_array().unwrap().contains(&"resize-vcpus".into()), "{told:#}");
    assert_eq!(told["hypervisor_path"], "/usr/bin/qemu-system-x86_64");
}

async fn another_program_is_none(backend: Backend) {
    let launcher = Launcher::start(backend).await;
    let status = ask(&launcher, "/bin/true").await.unwrap_err();
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    let name = match backend {
        Backend::Qemu => "QEMU",
        Backend::CloudHypervisor => "Cloud Hypervisor",
        Backend::Firecracker => "Firecracker",
        Backend::StratoVirt => "StratoVirt",
        Backend::Builtin => unreachable!("it is no other program"),
    };
    assert!(status.message.starts_with(&format!("/bin/true is not {name}: ")), "{status}");
}

async fn one_that_ends_when_it_is_asked_is_told(backend: Backend) {
    let status = ask_an_impostor(backend, "echo not today >&2; exit 3").await;
    // In a jail is no shell to execute it.
    let words = ["exited with status 3: not today", "execute /impostor in its jail: No such file or directory"];
    assert!(words.iter().any(|words| status.message.contains(words)), "{status}");
}

async fn one_that_hangs_is_told(backend: Backend) {
    let status = ask_an_impostor(backend, "exec sleep 1000").await;
    assert_eq!(status.code, Code::UNAVAILABLE);
    assert!(status.message.ends_with("impostor does not answer within 10 s"), "{status}");
}
