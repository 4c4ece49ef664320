//! A pod as Kubernetes makes it: a sandbox container and others that join its virtual machine.

use anyhow::Result;
use caisson_testbed::Containerd;
use procfs::process::Process;

use crate::LIMIT;

const SANDBOX: &str = "io.kubernetes.cri.container-type=sandbox";
const CONTAINER: &str = "io.kubernetes.cri.container-type=container";

#[test]
fn containers_of_one_pod_share_a_virtual_machine_and_not_a_fate() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let pod = containerd.run_detached(&["--annotation", SANDBOX], &["sleep", "600"])?;
    let sandbox_id = format!("io.kubernetes.cri.sandbox-id={pod}");
    let member = ["--annotation", CONTAINER, "--annotation", &sandbox_id];

    let first = containerd.run_detached(&member, &["sleep", "600"])?;
    let second = containerd.run(&member, &["sh", "-c", "cat /proc/sys/kernel/random/boot_id; exit 4"])?;
    assert_eq!(second.code, 4, "{}", second.stderr);
    let boot_id = |id: &str| containerd.exec(id, &["cat", "/proc/sys/kernel/random/boot_id"]).run();
    assert_eq!(boot_id(&pod)?.success()?.stdout_text(), second.stdout_text());
    assert_eq!(boot_id(&first)?.success()?.stdout_text(), second.stdout_text());
    assert_eq!(hypervisors(&containerd)?.len(), 1);

    containerd.remove(&first)?;
    containerd.remove(&pod)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn containers_of_one_pod_do_not_see_each_others_files() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let pod = containerd.run_detached(&["--annotation", SANDBOX], &["sleep", "600"])?;
    let sandbox_id = format!("io.kubernetes.cri.sandbox-id={pod}");
    let member = ["--annotation", CONTAINER, "--annotation", &sandbox_id];
    containerd.exec(&pod, &["touch", "/only-in-the-sandbox"]).run()?.success()?;
    assert_eq!(containerd.run(&member, &["ls", "/only-in-the-sandbox"])?.code, 1);
    containerd.remove(&pod)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn the_pods_end_ends_its_containers() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let pod = containerd.run_detached(&["--annotation", SANDBOX], &["sleep", "600"])?;
    let sandbox_id = format!("io.kubernetes.cri.sandbox-id={pod}");
    let member = ["--annotation", CONTAINER, "--annotation", &sandbox_id];
    let id = containerd.fresh_id();
    let command = ["sh", "-c", "echo up; exec sleep 600"];
    let session = containerd.prepare(&member, caisson_testbed::BUSYBOX, &id, &command).start()?;
    session.wait_for("up", LIMIT)?;

    hypervisors(&containerd)?.iter().try_for_each(|process| caisson_testbed::kill(process, LIMIT))?;
    assert_eq!(session.wait(LIMIT)?.code, 255);
    containerd.remove(&pod)?;
    containerd.assert_nothing_left();
    Ok(())
}

fn hypervisors(containerd: &Containerd) -> Result<Vec<Process>> {
    containerd.scope().processes_named(&containerd.hypervisor().process())
}
