//! Turns a container's configuration, which was written for the host, into one for the guest.
//!
//! The guest is the pod: its network is the container's network. Numbers of the host's processors, memory nodes and
//! disks mean nothing here, nor do its security modules.

use std::path::PathBuf;

use oci_spec::runtime::{
    Hooks, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, Process, Spec,
};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A part that every container has is missing.
    #[error("config.json has no \"{0}\"")]
    Missing(&'static str),
    /// The library refused a value.
    #[error("adapt config.json: {0}")]
    Value(#[from] oci_spec::OciSpecError),
}

/// For a container's first process.
///
/// # Errors
/// When `config` lacks `linux` or `process`.
pub fn of_container(mut config: Spec) -> Result<Spec, SpecError> {
    let mut process = config.process().clone().ok_or(SpecError::Missing("process"))?;
    adapt(&mut process);
    let mut linux = config.linux().clone().ok_or(SpecError::Missing("linux"))?;
    linux.set_namespaces(Some(namespaces(linux.namespaces().clone().unwrap_or_default())?));
    linux.set_resources(linux.resources().clone().map(guest_resources));
    linux.set_mount_label(None).set_intel_rdt(None).set_cgroups_path(None);
    config.set_process(Some(process)).set_linux(Some(linux));
    Ok(config)
}

/// For one more process in the container of `config`, beside the one with pid `init`: the same seccomp filter, the same
/// namespaces.
///
/// # Errors
/// As for [`of_container`].
pub fn of_exec(config: Spec, init: i32, mut process: Process) -> Result<Spec, SpecError> {
    adapt(&mut process);
    let mut spec = of_container(config)?;
    let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux"))?;
    let joined = linux.namespaces().iter().flatten().map(|namespace| {
        let kind = namespace.typ();
        LinuxNamespaceBuilder::default().typ(kind).path(format!("/proc/{init}/ns/{}", file_of(kind))).build()
    });
    let joined = joined.collect::<Result<Vec<_>, _>>()?;
    linux.set_namespaces(Some(joined)).set_resources(None).set_uid_mappings(None).set_gid_mappings(None);
    spec.set_process(Some(process)).set_linux(Some(linux)).set_hooks(None::<Hooks>).set_mounts(None);
    Ok(spec)
}

/// Resources without what names the host's hardware. Also for updates.
pub fn guest_resources(mut resources: LinuxResources) -> LinuxResources {
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None).set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    resources.set_block_io(None).set_rdma(None);
    resources
}

fn namespaces(mut listed: Vec<LinuxNamespace>) -> Result<Vec<LinuxNamespace>, SpecError> {
    listed.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    // The tree above the container's own cgroup is the agent's.
    if !listed.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup) {
        listed.push(LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Cgroup).path(PathBuf::new()).build()?);
    }
    for namespace in &mut listed {
        if namespace.path().as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            namespace.set_path(None);
        }
    }
    Ok(listed)
}

fn adapt(process: &mut Process) {
    process.set_apparmor_profile(None).set_selinux_label(None);
    // libcontainer takes a `false` for a wish, and would load the seccomp filter when it no longer may.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
}

fn file_of(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Spec {
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "root": { "path": "rootfs" },
            "process": { "cwd": "/", "args": ["sh"], "user": { "uid": 0, "gid": 0 }, "apparmorProfile": "cri" },
            "hooks": { "poststop": [{ "path": "/bin/true" }] },
            "linux": {
                "cgroupsPath": "/default/web",
                "namespaces": [{ "type": "pid" }, { "type": "network", "path": "/run/netns/x" }, { "type": "mount" }],
                "resources": { "cpu": { "shares": 512, "cpus": "0-63" } },
                "seccomp": { "defaultAction": "SCMP_ACT_ALLOW" }
            }
        }))
        .unwrap()
    }

    fn kinds(spec: &Spec) -> Vec<LinuxNamespaceType> {
        spec.linux().as_ref().unwrap().namespaces().iter().flatten().map(LinuxNamespace::typ).collect()
    }

    #[test]
    fn the_guests_network_is_the_containers_network() {
        let kinds = kinds(&of_container(config()).unwrap());
        assert_eq!(kinds, [LinuxNamespaceType::Pid, LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup]);
    }

    #[test]
    fn what_names_the_hosts_hardware_and_labels_is_dropped() {
        let spec = of_container(config()).unwrap();
        let cpu = spec.linux().as_ref().unwrap().resources().as_ref().unwrap().cpu().clone().unwrap();
        assert_eq!((cpu.shares(), cpu.cpus()), (Some(512), &None));
        assert_eq!(spec.process().as_ref().unwrap().apparmor_profile(), &None);
    }

    #[test]
    fn a_further_process_joins_every_namespace_and_keeps_the_seccomp_filter() {
        let process = config().process().clone().unwrap();
        let spec = of_exec(config(), 7, process).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let paths: Vec<_> = linux.namespaces().iter().flatten().map(|one| one.path().clone().unwrap()).collect();
        assert_eq!(paths, ["/proc/7/ns/pid", "/proc/7/ns/mnt", "/proc/7/ns/cgroup"].map(PathBuf::from));
        assert!(linux.seccomp().is_some() && spec.hooks().is_none());
    }

    #[test]
    fn a_configuration_without_linux_is_refused() {
        let mut config = config();
        config.set_linux(None);
        assert!(matches!(of_container(config), Err(SpecError::Missing("linux"))));
    }
}
