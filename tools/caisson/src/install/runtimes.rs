//! The runtimes that containerd and Kubernetes get to know: one for the configuration in force, and one for each
//! hypervisor.

use std::path::{Path, PathBuf};

use caisson_config_service::{defaults, installation::SHIPPED_FILE};

use super::containerd::SHIM;

/// A runtime handler.
#[derive(Clone, Debug)]
pub(super) struct Runtime {
    /// Its name in containerd and in a RuntimeClass.
    pub(super) handler: String,
    /// The hypervisor, in words for people; none for whatever is in force.
    pub(super) hypervisor: Option<&'static str>,
    /// The configuration of its pods; none for the one in force.
    pub(super) config_path: Option<PathBuf>,
    /// Where the shim is, when containerd does not look there by itself.
    pub(super) shim: Option<PathBuf>,
}

/// What systemd gives a service as PATH, `systemd.exec(5)`.
const SERVICE_PATH: [&str; 4] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];

/// All of them, the one for whatever is in force first.
pub(super) fn all(prefix: &Path) -> Vec<Runtime> {
    let programs = prefix.join("bin");
    let shim = (!SERVICE_PATH.iter().any(|dir| programs == Path::new(dir))).then(|| programs.join(SHIM));
    let configurations = prefix.join(SHIPPED_FILE);
    let in_force = Runtime { handler: "caisson".into(), hypervisor: None, config_path: None, shim: shim.clone() };
    let each = defaults::FILES.iter().map(|file| Runtime {
        handler: format!("caisson-{}", short_name(file.name)),
        hypervisor: Some(file.hypervisor),
        config_path: Some(configurations.with_file_name(file.name)),
        shim: shim.clone(),
    });
    [in_force].into_iter().chain(each).collect()
}

/// Of `configuration-fc.toml`: `fc`.
fn short_name(file: &str) -> &str {
    file.trim_start_matches("configuration-").trim_end_matches(".toml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hypervisor_has_a_runtime_of_its_own() {
        let handlers: Vec<_> = all(Path::new("/usr")).into_iter().map(|runtime| runtime.handler).collect();
        for handler in ["caisson", "caisson-qemu", "caisson-clh", "caisson-fc", "caisson-builtin", "caisson-dragonball"]
        {
            assert!(handlers.iter().any(|known| known == handler), "{handlers:?}");
        }
    }

    #[test]
    fn containerd_is_told_where_the_shim_is_only_where_it_does_not_look() {
        assert_eq!(all(Path::new("/usr/local"))[0].shim, None);
        let elsewhere = all(Path::new("/opt/caisson"))[0].shim.clone().unwrap();
        assert_eq!(elsewhere, Path::new("/opt/caisson/bin/containerd-shim-caisson-v2"));
    }
}
