//! `caisson env`: what is in force on this host, with versions and digests, in Kata Containers' sections.

use std::path::{Path, PathBuf};

use anyhow::Context;
use caisson_config_service::{
    installation::Installation,
    resolve::{Resolved, Resolver},
};
use caisson_protocol::config::SandboxConfig;
use serde::Serialize;

use crate::{built, digest, host, launcher, output::Format, program};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  caisson env
  caisson env | awk -v RS= '/\\[Hypervisor\\]/' | grep Path     the hypervisor in force
  caisson env --json | jq -r .Kernel.Sha256")]
pub(crate) struct Arguments {
    /// A configuration; without it, the one that a sandbox would get.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Each a section; plain values come before tables, as TOML wants it.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Environment {
    meta: Meta,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<Kernel>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<Asset>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<Asset>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hypervisor: Option<Hypervisor>,
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<Agent>,
    runtime: Runtime,
    #[serde(skip_serializing_if = "Option::is_none")]
    shared_fs: Option<SharedFs>,
    programs: Vec<Program>,
    host: host::Host,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Meta {
    /// Of this output's form.
    version: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Kernel {
    path: String,
    version: String,
    sha256: String,
    parameters: String,
}

/// A file that the guest starts from.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Asset {
    path: String,
    sha256: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Hypervisor {
    name: String,
    path: String,
    version: String,
    sha256: String,
    accelerator: String,
    accelerator_reason: String,
    #[serde(rename = "DefaultVCPUs")]
    default_vcpus: u32,
    #[serde(rename = "DefaultMemoryMiB")]
    default_memory_mib: u64,
    /// The hypervisor's own keys, as TOML.
    #[serde(skip_serializing_if = "String::is_empty")]
    options: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Agent {
    debug_console: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Runtime {
    version: &'static str,
    log_level: String,
    /// The configuration in force; empty when there is none.
    config_path: String,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    config_problems: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SharedFs {
    daemon: String,
    version: String,
    cache: String,
}

/// One of caisson's own.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Program {
    name: String,
    path: PathBuf,
    version: String,
    sha256: String,
}

pub(crate) async fn run(arguments: Arguments, format: Format) -> anyhow::Result<()> {
    let installation = Installation::of_this_program();
    let requested = arguments.config.as_deref().map(std::path::absolute).transpose()?;
    let resolved = Resolver::new(installation.clone()).resolve(requested.as_deref()).await;
    let environment = gather(&installation, resolved.map_err(|problems| problems.sentences())).await;
    let text = toml::to_string(&environment).context("write the environment as TOML")?;
    format.print(&environment, |_| text)
}

async fn gather(installation: &Installation, resolved: Result<Resolved, Vec<String>>) -> Environment {
    let (config, config_problems) = match resolved {
        Ok(resolved) => (Some(resolved.config), Vec::new()),
        Err(problems) => (None, problems),
    };
    let (hypervisor, shared_fs) = match &config {
        Some(config) => (hypervisor(installation, config).await, shared_fs(config).await),
        None => (None, None),
    };
    Environment {
        meta: Meta { version: "1.0" },
        kernel: config.as_ref().map(kernel),
        image: config.as_ref().and_then(|config| asset(&config.vm.image)),
        initrd: config.as_ref().and_then(|config| asset(&config.vm.initrd)),
        hypervisor,
        agent: config.as_ref().map(|config| Agent { debug_console: config.debug_console }),
        runtime: Runtime {
            version: env!("CARGO_PKG_VERSION"),
            log_level: config.as_ref().map(|config| config.log_level.clone()).unwrap_or_default(),
            config_path: config.as_ref().map(|config| config.origin.clone()).unwrap_or_default(),
            config_problems,
        },
        shared_fs,
        programs: programs(installation).await,
        host: host::Host::look(),
    }
}

fn kernel(config: &SandboxConfig) -> Kernel {
    let path = config.vm.kernel.clone();
    let sha256 = digest(&path);
    let release = built::kernel_release(Path::new(&path), &sha256);
    let version = release.unwrap_or_else(|error| format!("unknown: {error:#}"));
    Kernel { version, sha256, path, parameters: config.vm.kernel_params.clone() }
}

/// None when the launcher is not there, which is then one of the configuration's problems.
async fn hypervisor(installation: &Installation, config: &SandboxConfig) -> Option<Hypervisor> {
    let launcher = launcher::find(&installation.program_dirs, &config.hypervisor)?;
    let path = config.vm.hypervisor_path.clone();
    let told = launcher::capabilities(&launcher, Some(config)).await;
    let (version, accelerator, accelerator_reason) = match told {
        Ok(told) => (told.version, told.accelerator, told.accelerator_reason),
        Err(error) => (format!("unknown: {error:#}"), String::new(), String::new()),
    };
    let path = if path.is_empty() { launcher.display().to_string() } else { path };
    Some(Hypervisor {
        name: config.hypervisor.clone(),
        sha256: digest(&path),
        path,
        version,
        accelerator,
        accelerator_reason,
        default_vcpus: config.vm.vcpus,
        default_memory_mib: config.vm.memory_mib,
        options: config.options.trim_end().to_owned(),
    })
}

async fn shared_fs(config: &SandboxConfig) -> Option<SharedFs> {
    let shared = config.shared_fs.as_ref()?;
    let version = program::version(Path::new(&shared.daemon_path)).await;
    Some(SharedFs {
        daemon: shared.daemon_path.clone(),
        version: version.unwrap_or_else(|error| format!("unknown: {error:#}")),
        cache: shared.cache.clone(),
    })
}

async fn programs(installation: &Installation) -> Vec<Program> {
    let mut names = vec!["containerd-shim-caisson-v2".to_owned(), "caisson-config-service".to_owned()];
    names.extend(launcher::installed(&installation.program_dirs).iter().map(|name| format!("caisson-vmm-{name}")));
    let mut programs = Vec::new();
    for name in names {
        let Some(path) = program::find(&installation.program_dirs, &name) else { continue };
        let version = program::version(&path).await.unwrap_or_else(|error| format!("unknown: {error:#}"));
        programs.push(Program { sha256: digest(&path), version, name, path });
    }
    programs
}

fn asset(path: &str) -> Option<Asset> {
    (!path.is_empty()).then(|| Asset { path: path.to_owned(), sha256: digest(path) })
}

/// SHA-256 in hexadecimal, or why there is none.
fn digest(path: impl AsRef<Path>) -> String {
    digest::of_file(path.as_ref()).unwrap_or_else(|error| format!("unknown: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_read_has_its_reason_in_place_of_the_digest() {
        assert_eq!(digest("/nonexistent"), "unknown: No such file or directory (os error 2)");
    }

    #[tokio::test]
    async fn a_broken_configuration_is_told_and_the_rest_still_printed() {
        let installation = Installation { configurations: vec![], program_dirs: vec![] };
        let environment = gather(&installation, Err(vec!["/etc/x.toml: no".into()])).await;
        let text = toml::to_string(&environment).unwrap();
        assert!(text.contains("ConfigProblems = [\"/etc/x.toml: no\"]"), "{text}");
        assert!(text.contains("[Host]") && !text.contains("[Hypervisor]"), "{text}");
    }

    #[test]
    fn the_hypervisor_is_one_paragraph_with_its_path() {
        let hypervisor = Hypervisor {
            name: "qemu".into(),
            path: "/usr/bin/qemu".into(),
            version: "7".into(),
            sha256: String::new(),
            accelerator: "kvm".into(),
            accelerator_reason: String::new(),
            default_vcpus: 1,
            default_memory_mib: 256,
            options: "machine_type = \"q35\"".into(),
        };
        let sections = [
            ("Meta", toml::Value::try_from(Meta { version: "1.0" }).unwrap()),
            ("Hypervisor", toml::Value::try_from(hypervisor).unwrap()),
        ];
        let text =
            toml::to_string(&toml::Table::from_iter(sections.map(|(name, value)| (name.into(), value)))).unwrap();
        let paragraph = text.split("\n\n").find(|paragraph| paragraph.contains("[Hypervisor]")).unwrap();
        assert!(paragraph.contains("\nPath = \"/usr/bin/qemu\""), "{text}");
    }
}
