//! Kubernetes' side: pods of several RuntimeClasses on one host, and what their annotations may do.

use anyhow::{Context, Result};
use caisson_testbed::{Configuration, Containerd, Hypervisor, Installation};

use crate::cri_client::Cri;

/// Where there is KVM, caisson's own VMM and QEMU; elsewhere QEMU as two machines.
#[test]
fn pods_of_two_runtime_classes_have_two_hypervisors_at_once() -> Result<()> {
    let installation = Installation::find()?;
    let of_this_run = Configuration::of_this_run(&installation);
    let is_qemu = of_this_run.hypervisor().name() == Hypervisor::QEMU;
    let other = Hypervisor::named(Hypervisor::QEMU, &installation).with_option("machine_type", "q35");
    let other = Configuration::new(other, &installation).with_option("default_vcpus", 2);
    let containerd = Containerd::start_for_pods(&installation, &[("one", &of_this_run), ("other", &other)])?;
    let mut cri = connect(&containerd)?;

    let one = cri.run_pod("one", "one", &[])?;
    let two = cri.run_pod("two", "other", &[])?;
    assert_eq!(cri.exec(&one, &["nproc"])?, "1\n");
    assert_eq!(cri.exec(&two, &["nproc"])?, "2\n");
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
    let allowed = toml::Value::from(vec!["default_vcpus"]);
    let configuration = Configuration::of_this_run(&installation).with_option("enable_annotations", allowed);
    let containerd = Containerd::start_for_pods(&installation, &[("one", &configuration)])?;
    let mut cri = connect(&containerd)?;

    let large = cri.run_pod("large", "one", &[("io.katacontainers.config.hypervisor.default_vcpus", "2")])?;
    assert_eq!(cri.exec(&large, &["nproc"])?, "2\n");
    let annotation = "io.caisson.config.hypervisor.kernel_params";
    let refused = cri.run_pod("quiet", "one", &[(annotation, "quiet")]).err().context("it is not allowed")?.to_string();
    let file = containerd.scope().dir().join("one.toml").display().to_string();
    for part in [annotation, "enable_annotations", &file] {
        assert!(refused.contains(part), "no \"{part}\" in: {refused}");
    }

    cri.remove_pod(large)?;
    containerd.assert_nothing_left();
    Ok(())
}

fn connect(containerd: &Containerd) -> Result<Cri> {
    Cri::connect(&containerd.socket(), &containerd.scope().name())
}
