//! containerd's bundle: the container's OCI configuration, and what it says about the pod.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use caisson_protocol::id::Id;
use oci_spec::runtime::Spec;

use crate::{Error, Result};

/// `io.kubernetes.cri.*` is containerd's, the other CRI-O's.
const KIND: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOX: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// A container's place in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// A container of its own, as `ctr run` makes it.
    Single,
    /// The first container of a pod, which holds it.
    PodSandbox,
    /// A further container of the pod with this id.
    PodMember(Id),
}

/// A bundle that has been read.
#[derive(Debug)]
pub struct Bundle {
    /// `config.json`.
    pub spec: Spec,
}

impl Bundle {
    /// Reads `<directory>/config.json`.
    pub fn load(directory: &Path) -> Result<Self> {
        let path: PathBuf = directory.join("config.json");
        let spec = Spec::load(&path).map_err(|source| Error::ReadBundle { path, source })?;
        Ok(Self { spec })
    }

    /// All annotations.
    pub fn annotations(&self) -> HashMap<String, String> {
        self.spec.annotations().clone().unwrap_or_default()
    }

    /// Reads the place in the pod from the annotations of Kubernetes' runtimes.
    pub fn role(&self) -> Result<Role> {
        let find = |names: [&str; 2]| {
            let annotations = self.spec.annotations().as_ref()?;
            names.iter().find_map(|name| annotations.get(*name)).map(String::as_str)
        };
        match (find(KIND), find(SANDBOX)) {
            (Some("container"), Some(id)) => Ok(Role::PodMember(Id::parse("sandbox id", id)?)),
            (Some("sandbox"), _) => Ok(Role::PodSandbox),
            _ => Ok(Role::Single),
        }
    }

    /// What the container may use at most, in MiB; `None` without a limit.
    pub fn memory_limit_mib(&self) -> Option<u64> {
        let limit = self.spec.linux().as_ref()?.resources().as_ref()?.memory().as_ref()?.limit()?;
        u64::try_from(limit).ok().filter(|bytes| *bytes > 0).map(|bytes| bytes.div_ceil(1 << 20))
    }

    /// How many processors the container may keep busy; `None` without a limit.
    pub fn vcpu_limit(&self) -> Option<u32> {
        let cpu = self.spec.linux().as_ref()?.resources().as_ref()?.cpu().as_ref()?;
        let (quota, period) = (u64::try_from(cpu.quota()?).ok()?, cpu.period().unwrap_or(100_000));
        (quota > 0 && period > 0).then(|| quota.div_ceil(period).min(u64::from(u32::MAX)) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(json: &str) -> Bundle {
        Bundle { spec: serde_json::from_str(json).unwrap() }
    }

    #[test]
    fn a_plain_container_stands_alone() {
        assert_eq!(bundle(r#"{"ociVersion":"1.0.2"}"#).role().unwrap(), Role::Single);
    }

    #[test]
    fn kubernetes_annotations_place_a_container_in_its_pod() {
        let member = bundle(
            r#"{"ociVersion":"1.0.2","annotations":{
                "io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"pod1"}}"#,
        );
        assert_eq!(member.role().unwrap(), Role::PodMember(Id::parse("", "pod1").unwrap()));
    }

    #[test]
    fn a_sandbox_id_that_is_a_path_is_refused() {
        let member = bundle(
            r#"{"ociVersion":"1.0.2","annotations":{
                "io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"../x"}}"#,
        );
        assert!(member.role().is_err());
    }

    #[test]
    fn limits_are_rounded_up() {
        let limited = bundle(
            r#"{"ociVersion":"1.0.2","linux":{"resources":{
                "memory":{"limit":1048577},"cpu":{"quota":150000,"period":100000}}}}"#,
        );
        assert_eq!((limited.memory_limit_mib(), limited.vcpu_limit()), (Some(2), Some(2)));
    }

    #[test]
    fn a_missing_bundle_is_named() {
        let error = Bundle::load(Path::new("/nonexistent")).unwrap_err();
        assert_eq!(error.to_string(), "read bundle config /nonexistent/config.json");
    }
}
