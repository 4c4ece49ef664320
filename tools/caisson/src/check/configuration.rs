//! Can this configuration run here?

use std::path::Path;

use caisson_config_service::{installation::Installation, problem::Problems, resolve::Resolved};
use caisson_protocol::config::SandboxConfig;

use super::Finding;
use crate::{host, launcher::Capabilities, program};

/// Every finding about `resolved`; `told` is the answer of its launcher, when that was found.
pub(super) async fn examine(
    installation: &Installation,
    resolved: &Result<Resolved, Problems>,
    told: Option<&anyhow::Result<Capabilities>>,
) -> Vec<Finding> {
    let mut findings = vec![config_service(installation)];
    let config = match resolved {
        Ok(resolved) => &resolved.config,
        Err(problems) => {
            let remedy = match problems.file {
                Some(_) => "mend the file; `caisson config reference` tells what each key takes",
                None => "run `caisson install`, or write /etc/caisson/configuration.toml",
            };
            findings.extend(problems.sentences().into_iter().map(|told| Finding::fail("configuration", told, remedy)));
            return findings;
        }
    };
    findings.push(Finding::pass("configuration", &config.origin));
    findings.push(hypervisor(config, told));
    findings.push(asset("kernel", &config.vm.kernel));
    let root = if config.vm.image.is_empty() { ("initrd", &config.vm.initrd) } else { ("image", &config.vm.image) };
    if !root.1.is_empty() {
        findings.push(asset(root.0, root.1));
    }
    if let Some(shared) = config.shared_fs.as_ref() {
        findings.push(virtiofsd(&shared.daemon_path).await);
    }
    findings.push(memory(config.vm.memory_mib, host::memory()));
    findings.push(vcpus(config.vm.vcpus, host::cpus()));
    findings
}

fn config_service(installation: &Installation) -> Finding {
    const NAME: &str = caisson_config_service::client::PROGRAM;
    match program::find(&installation.program_dirs, NAME) {
        Some(path) => Finding::pass("config-service", path.display().to_string()),
        None => Finding::fail("config-service", format!("there is no {NAME}"), "run `caisson install`"),
    }
}

fn hypervisor(config: &SandboxConfig, told: Option<&anyhow::Result<Capabilities>>) -> Finding {
    let name = &config.hypervisor;
    match told {
        Some(Ok(told)) => {
            let by = if told.accelerator.is_empty() { String::new() } else { format!(", by {}", told.accelerator) };
            Finding::pass("hypervisor", format!("{name} {}{by}", told.version))
        }
        Some(Err(error)) => {
            let remedy = format!("install {name}, set its `path`, or choose another: `caisson hypervisor list`");
            Finding::fail("hypervisor", format!("{error:#}"), remedy)
        }
        None => Finding::fail("hypervisor", format!("there is no caisson-vmm-{name}"), "run `caisson install`"),
    }
}

/// A file that the guest starts from. That it exists has been checked with the configuration.
fn asset(subject: &str, path: &str) -> Finding {
    match std::fs::metadata(path).map(|metadata| metadata.len()) {
        Ok(0) => Finding::fail(subject, format!("{path} is empty"), "make it anew: `image-builder build all`"),
        Ok(length) => Finding::pass(subject, format!("{path} ({:.1} MB)", length as f64 / 1e6)),
        Err(error) => Finding::fail(subject, format!("{path}: {error}"), "make it: `image-builder build all`"),
    }
}

async fn virtiofsd(path: &str) -> Finding {
    match program::version(Path::new(path)).await {
        Ok(version) => Finding::pass("virtiofsd", format!("{version} ({path})")),
        Err(error) => {
            let remedy = "install virtiofsd 1.11 or newer, or set `virtio_fs_daemon` to where it is";
            Finding::fail("virtiofsd", format!("{error:#}"), remedy)
        }
    }
}

fn memory(wanted: u64, host: host::Memory) -> Finding {
    let found = format!("{wanted} MiB for each sandbox; the host has {} MiB, {} available", host.total, host.available);
    if wanted > host.total {
        Finding::fail("memory", found, "lower `default_memory`")
    } else if wanted > host.available {
        Finding::warn("memory", found, "free some memory, or lower `default_memory`")
    } else {
        Finding::pass("memory", found)
    }
}

fn vcpus(wanted: u32, host: usize) -> Finding {
    let cpus = if host == 1 { "CPU" } else { "CPUs" };
    let found = format!("{wanted} for each sandbox; the host has {host} {cpus}");
    if wanted as usize > host {
        Finding::warn("vCPUs", found, "lower `default_vcpus`: vCPUs that outnumber CPUs wait for each other")
    } else {
        Finding::pass("vCPUs", found)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn more_memory_than_there_is_fails_and_more_than_is_free_warns() {
        let host = host::Memory { total: 1000, available: 500 };
        let verdicts = [2000, 700, 100].map(|wanted| memory(wanted, host).verdict);
        assert_eq!(verdicts, [Verdict::Fail, Verdict::Warn, Verdict::Pass]);
    }

    #[test]
    fn an_empty_kernel_is_no_kernel() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let told = asset("kernel", file.path().to_str().unwrap());
        assert!(told.verdict == Verdict::Fail && told.found.ends_with("is empty"), "{told:?}");
    }

    #[test]
    fn a_launcher_that_fails_is_quoted() {
        let config = SandboxConfig { hypervisor: "firecracker".into(), ..Default::default() };
        let told = hypervisor(&config, Some(&Err(anyhow::anyhow!("execute /usr/bin/firecracker: no such file"))));
        assert_eq!(told.found, "execute /usr/bin/firecracker: no such file");
        assert!(told.remedy.unwrap().starts_with("install firecracker"));
    }

    #[tokio::test]
    async fn a_missing_virtiofsd_is_named_with_its_key() {
        let told = virtiofsd("/nonexistent/virtiofsd").await;
        assert!(told.found.contains("/nonexistent/virtiofsd"), "{told:?}");
        assert!(told.remedy.unwrap().contains("virtio_fs_daemon"));
    }
}
