//! Everything that an installation consists of.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use caisson_config_service::{
    defaults,
    installation::{Installation, SHIPPED_FILE},
    units,
};

use super::{
    containerd::SHIM,
    files::{Artifact, Content},
    manual, runtime_class, runtimes,
};
use crate::{launcher, program};

/// Lets systemd start the config-service when the first shim asks.
pub(super) const SOCKET_UNIT: &str = "caisson-config-service.socket";
/// What `systemctl enable` makes of it.
pub(super) const ENABLED_SOCKET: &str = "/etc/systemd/system/sockets.target.wants/caisson-config-service.socket";
const SERVICE_UNIT: &str = "caisson-config-service.service";
/// Without these there is no runtime.
const NEEDED: [&str; 3] = ["caisson", SHIM, "caisson-config-service"];
/// Taken along where it is there.
const USEFUL: [&str; 1] = ["image-builder"];

/// What goes where, and what a person should know about it.
pub(super) struct Artifacts {
    pub(super) files: Vec<Artifact>,
    pub(super) notes: Vec<String>,
}

/// The programs of the folder `source`, and what is generated for `prefix`.
pub(super) async fn all(installation: &Installation, source: &Path, prefix: &Path) -> anyhow::Result<Artifacts> {
    let mut files = programs(source, prefix)?;
    let configuration = prefix.join(SHIPPED_FILE);
    for (name, text) in defaults::generate(installation, prefix).await {
        files.push(Artifact { path: configuration.with_file_name(name), content: Content::Text(text) });
    }
    let recommendation = defaults::recommend(installation).await;
    let notes =
        vec![format!("the default hypervisor is {}: {}", recommendation.file.hypervisor, recommendation.reason)];
    files.push(Artifact { path: configuration, content: Content::Link(recommendation.file.name.into()) });
    for runtime in runtimes::all(prefix) {
        let path = runtime_classes_dir(prefix).join(format!("{}.yaml", runtime.handler));
        files.push(Artifact { path, content: Content::Text(runtime_class::manifest(&runtime)) });
    }
    for (name, text) in [(SOCKET_UNIT, units::SOCKET.to_owned()), (SERVICE_UNIT, units::service(prefix))] {
        files.push(Artifact { path: units_dir(prefix).join(name), content: Content::Text(text) });
    }
    let manual = manual::all(prefix)?.into_iter().map(|(path, text)| Artifact { path, content: Content::Text(text) });
    files.extend(manual);
    Ok(Artifacts { files, notes })
}

/// Where the RuntimeClass manifests go.
pub(super) fn runtime_classes_dir(prefix: &Path) -> PathBuf {
    prefix.join("share/caisson/runtime-classes")
}

/// Where systemd looks, `systemd.unit(5)`.
fn units_dir(prefix: &Path) -> PathBuf {
    match prefix.to_str() {
        Some("/usr" | "/usr/local") => prefix.join("lib/systemd/system"),
        _ => PathBuf::from("/etc/systemd/system"),
    }
}

fn programs(source: &Path, prefix: &Path) -> anyhow::Result<Vec<Artifact>> {
    let source = source.canonicalize().with_context(|| format!("find the programs in {}", source.display()))?;
    let missing = NEEDED.iter().find(|name| !program::is_program(&source.join(name)));
    if let Some(missing) = missing {
        bail!("there is no {missing} in {}: run `caisson install` from a folder with all programs", source.display());
    }
    let dirs = [source.clone()];
    let launchers = launcher::installed(&dirs);
    if launchers.is_empty() {
        bail!("there is no launcher in {}: at least one caisson-vmm-<hypervisor> is needed", source.display());
    }
    let mut names: Vec<_> = NEEDED.map(str::to_owned).into();
    names.extend(launchers.iter().map(|hypervisor| format!("caisson-vmm-{hypervisor}")));
    names.extend(USEFUL.iter().filter(|name| program::is_program(&source.join(name))).map(|name| (*name).to_owned()));
    let artifact =
        |name: String| Artifact { path: prefix.join("bin").join(&name), content: Content::Program(source.join(name)) };
    Ok(names.into_iter().map(artifact).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_program_is_refused_and_the_program_named() {
        let dir = tempfile::tempdir().unwrap();
        let told = programs(dir.path(), Path::new("/usr")).unwrap_err().to_string();
        assert!(told.starts_with("there is no caisson in "), "{told}");
    }

    #[test]
    fn units_go_where_systemd_looks() {
        assert_eq!(units_dir(Path::new("/usr")), Path::new("/usr/lib/systemd/system"));
        assert_eq!(units_dir(Path::new("/opt/x")), Path::new("/etc/systemd/system"));
    }
}
