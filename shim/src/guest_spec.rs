//! The container's OCI configuration as the guest shall run it: without what only the host has.

use std::path::{Path, PathBuf};

use caisson_protocol::{id::Id, paths::GUEST_SHARED_DIR};
use oci_spec::runtime::{Hooks, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, Mount, Spec};

use crate::{Error, Result, bundle::Role};

/// A host path that the guest sees through the shared directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedPath {
    /// On the host.
    pub source: PathBuf,
    /// Its name below the container's `mounts` folder.
    pub name: String,
    /// Whether mounts below the source come along.
    pub recursive: bool,
    /// In the container.
    pub destination: PathBuf,
    /// Whether the container cannot write to it.
    pub read_only: bool,
}

/// Translates `spec`, and says which host paths must be shared for it.
///
/// # Errors
/// When the container is to have a disk of the host.
pub fn for_guest(mut spec: Spec, id: &Id, role: &Role) -> Result<(Spec, Vec<SharedPath>)> {
    let mut shared = Vec::new();
    if let Some(mounts) = spec.mounts_mut() {
        for mount in mounts {
            share(mount, id, &mut shared);
        }
    }
    if let Some(root) = spec.root_mut() {
        root.set_path("rootfs".into());
    }
    if let Some(process) = spec.process_mut() {
        // Labels of the host's security modules mean nothing to the guest's kernel.
        process.set_selinux_label(None).set_apparmor_profile(None);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.devices().iter().flatten().try_for_each(check_device)?;
        linux.set_mount_label(None);
        let namespaces =
            linux.namespaces().iter().flatten().filter(|namespace| keep(namespace, role)).cloned().collect();
        linux.set_namespaces(Some(namespaces));
    }
    let hooks = spec.hooks().as_ref().map(hooks_in_container);
    spec.set_hooks(hooks);
    Ok((spec, shared))
}

/// A device is passed on as a number, by which the guest's kernel knows the same character device, but another disk.
fn check_device(device: &LinuxDevice) -> Result<()> {
    if device.typ() != LinuxDeviceType::B {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "give the container the block device {}: the guest has none of the host's disks; leave it out, and where it came \
         with a privileged container set the runtime's privileged_without_host_devices = true in containerd's \
         configuration",
        device.path().display()
    )))
}

/// The virtual machine is the pod's network, and in a pod its host name and IPC as well. A path names a namespace of
/// the host.
fn keep(namespace: &LinuxNamespace, role: &Role) -> bool {
    use LinuxNamespaceType::{Ipc, Network, Uts};
    let pod_wide = matches!(namespace.typ(), Ipc | Uts) && *role != Role::Single;
    namespace.typ() != Network && !pod_wide && namespace.path().is_none()
}

/// Hooks of the container namespace run in the guest; those of the runtime namespace (OCI `config.md`, "POSIX-platform
/// Hooks") name programs of the host.
fn hooks_in_container(hooks: &Hooks) -> Hooks {
    let mut kept = Hooks::default();
    kept.set_create_container(hooks.create_container().clone()).set_start_container(hooks.start_container().clone());
    kept
}

fn share(mount: &mut Mount, id: &Id, shared: &mut Vec<SharedPath>) {
    let options = mount.options().clone().unwrap_or_default();
    let recursive = options.iter().any(|option| option == "rbind");
    let is_bind = recursive || mount.typ().as_deref() == Some("bind") || options.iter().any(|option| option == "bind");
    let Some(source) = mount.source().clone().filter(|source| is_bind && !is_kernel_path(source)) else { return };
    let name = shared.len().to_string();
    mount.set_source(Some(Path::new(GUEST_SHARED_DIR).join(id.as_str()).join("mounts").join(&name)));
    let read_only = options.iter().any(|option| option == "ro" || option == "rro");
    shared.push(SharedPath { source, name, recursive, destination: mount.destination().clone(), read_only });
}

/// Whether the path speaks of the kernel, and so of the guest's.
fn is_kernel_path(path: &Path) -> bool {
    ["/proc", "/sys", "/dev"].iter().any(|top| path.starts_with(top))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(json: &str, role: &Role) -> Result<(Spec, Vec<SharedPath>)> {
        for_guest(serde_json::from_str(json).unwrap(), &Id::parse("", "web").unwrap(), role)
    }

    fn translate(json: &str, role: &Role) -> (Spec, Vec<SharedPath>) {
        translated(json, role).unwrap()
    }

    const SPEC: &str = r#"{"ociVersion":"1.0.2","root":{"path":"/var/x/rootfs"},
        "mounts":[
            {"destination":"/proc","type":"proc","source":"proc"},
            {"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","ro"]},
            {"destination":"/sys/fs/bpf","type":"bind","source":"/sys/fs/bpf","options":["bind"]}],
        "hooks":{"prestart":[{"path":"/usr/bin/host-hook"}],"startContainer":[{"path":"/guest-hook"}]},
        "linux":{"namespaces":[{"type":"pid"},{"type":"network"},{"type":"ipc"},{"type":"uts","path":"/proc/7/ns/uts"},{"type":"mount"}]}}"#;

    fn kinds(spec: &Spec) -> Vec<LinuxNamespaceType> {
        spec.linux().as_ref().unwrap().namespaces().iter().flatten().map(LinuxNamespace::typ).collect()
    }

    #[test]
    fn host_binds_are_shared_and_their_sources_renamed() {
        let (spec, shared) = translate(SPEC, &Role::Single);
        let expected = SharedPath {
            source: "/srv/data".into(),
            name: "0".into(),
            recursive: true,
            destination: "/data".into(),
            read_only: true,
        };
        assert_eq!(shared, [expected]);
        let sources: Vec<_> = spec.mounts().iter().flatten().filter_map(|mount| mount.source().clone()).collect();
        assert_eq!(
            sources,
            [Path::new("proc"), Path::new("/run/caisson/shared/web/mounts/0"), Path::new("/sys/fs/bpf")]
        );
    }

    #[test]
    fn namespaces_of_the_host_and_the_network_are_left_out() {
        use LinuxNamespaceType::{Ipc, Mount, Pid};
        assert_eq!(kinds(&translate(SPEC, &Role::Single).0), [Pid, Ipc, Mount]);
    }

    #[test]
    fn a_pods_containers_share_ipc() {
        use LinuxNamespaceType::{Mount, Pid};
        assert_eq!(kinds(&translate(SPEC, &Role::PodSandbox).0), [Pid, Mount]);
    }

    /// A container with one device.
    fn with_device(kind: &str, path: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"devices":[{{"path":"{path}","type":"{kind}","major":8,"minor":16}}]}}}}"#
        )
    }

    #[test]
    fn a_disk_of_the_host_is_refused_by_name() {
        let error = translated(&with_device("b", "/dev/sdb"), &Role::Single).unwrap_err().to_string();
        assert!(error.starts_with("give the container the block device /dev/sdb: the guest has none"), "{error}");
    }

    #[test]
    fn a_character_device_is_passed_on() {
        let (spec, _) = translate(&with_device("c", "/dev/fuse"), &Role::Single);
        assert_eq!(spec.linux().as_ref().unwrap().devices().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn hooks_of_the_host_stay_on_the_host() {
        let hooks = translate(SPEC, &Role::Single).0.hooks().clone().unwrap();
        assert!(hooks.start_container().is_some());
        #[allow(deprecated)]
        let prestart = hooks.prestart().clone();
        assert!(prestart.is_none());
    }
}
