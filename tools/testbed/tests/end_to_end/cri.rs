//! Kubernetes' side: pods of several RuntimeClasses on one host, and what their annotations may do.

use anyhow::{Context, Result};
use caisson_testbed::{Configuration, Containerd, Hypervisor, Installation};

use crate::cri_client::{Cri, Pod, WantedPod};

/// Where there is KVM, caisson's own VMM and QEMU; elsewhere QEMU as two machines.
#[test]
fn pods_of_two_runtime_classes_have_two_hypervisors_at_once() -> Result<()> {
    let installation = Installation::find()?;
    let of_this_run = Configuration::of_this_run(&installation);
    let is_qemu = of_this_run.hypervisor().name() == Hypervisor::QEMU;
    let other = Hypervisor::named(Hypervisor::QEMU, &installation).with_option("machine_type", "q35");
    let other = Configuration::new(other, &installation).with_option("default_memory", 384);
    let containerd = Containerd::start_for_pods(&installation, &[("one", &of_this_run), ("other", &other)])?;
    let mut cri = connect(&containerd)?;

    let one = cri.run_pod(&WantedPod { name: "one", handler: "one", ..Default::default() })?;
    let two = cri.run_pod(&WantedPod { name: "two", handler: "other", ..Default::default() })?;
    let (first, second) = (memory_mib(&mut cri, &one)?, memory_mib(&mut cri, &two)?);
    assert!(second > first + 64, "{first} MiB and {second} MiB");
    let guests = |hypervisor: &Hypervisor| containerd.scope().processes_named(&hypervisor.process());
    assert_eq!(guests(other.hypervisor())?.len(), if is_qemu { 2 } else { 1 });
    assert_eq!(guests(of_this_run.hypervisor())?.len(), if is_qemu { 2 } else { 1 });

    cri.remove_pod(one)?;
    assert_eq!(cri.exec(&two, &["echo", "still here"])?, "still here\n");
    cri.remove_pod(two)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_pods_annotation_counts_when_it_is_allowed_and_is_told_when_not() -> Result<()> {
    let installation = Installation::find()?;
    let allowed = toml::Value::from(vec!["default_memory"]);
    let configuration = Configuration::of_this_run(&installation).with_option("enable_annotations", allowed);
    let containerd = Containerd::start_for_pods(&installation, &[("one", &configuration)])?;
    let mut cri = connect(&containerd)?;

    let annotations = [("io.katacontainers.config.hypervisor.default_memory", "384")];
    let wanted = WantedPod { name: "large", handler: "one", annotations: &annotations, ..Default::default() };
    let large = cri.run_pod(&wanted)?;
    let memory_mib = memory_mib(&mut cri, &large)?;
    assert!(memory_mib > 256, "{memory_mib} MiB");
    let annotation = "io.caisson.config.hypervisor.kernel_params";
    let wanted = WantedPod { name: "quiet", annotations: &[(annotation, "quiet")], ..wanted };
    let refused = cri.run_pod(&wanted).err().context("it is not allowed")?.to_string();
    let file = containerd.scope().dir().join("one.toml").display().to_string();
    for part in [annotation, "enable_annotations", &file] {
        assert!(refused.contains(part), "no \"{part}\" in: {refused}");
    }

    cri.remove_pod(large)?;
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_pods_memory_limit_is_added_to_its_machines_memory() -> Result<()> {
    let installation = Installation::find()?;
    let configuration = Configuration::of_this_run(&installation);
    let containerd = Containerd::start_for_pods(&installation, &[("one", &configuration)])?;
    let mut cri = connect(&containerd)?;

    let wanted = WantedPod { name: "small", handler: "one", ..Default::default() };
    let small = cri.run_pod(&wanted)?;
    let large = cri.run_pod(&WantedPod { name: "large", memory_bytes: 128 << 20, ..wanted })?;
    let (first, second) = (memory_mib(&mut cri, &small)?, memory_mib(&mut cri, &large)?);
    // The kernel keeps a little of it to know the rest by.
    assert!((first + 120..=first + 128).contains(&second), "{first} MiB and {second} MiB");

    cri.remove_pod(small)?;
    cri.remove_pod(large)?;
    containerd.assert_nothing_left();
    Ok(())
}

/// What the guest's kernel manages.
fn memory_mib(cri: &mut Cri, pod: &Pod) -> Result<u64> {
    let told = cri.exec(pod, &["free", "-m"])?;
    let total = told.lines().find_map(|line| line.strip_prefix("Mem:")?.split_whitespace().next()?.parse().ok());
    total.with_context(|| format!("no memory in: {told}"))
}

fn connect(containerd: &Containerd) -> Result<Cri> {
    Cri::connect(&containerd.socket(), &containerd.scope().name())
}
