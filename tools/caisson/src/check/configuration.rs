//! Can this configuration run here?

use std::path::{Path, PathBuf};

use caisson_config_service::{installation::Installation, problem::Problems, resolve::Resolved};
use caisson_protocol::config::SandboxConfig;
use nix::unistd::{AccessFlags, access};

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
    } else {
        findings.push(inotify(&host::read("/proc/sys/fs/inotify/max_user_instances")));
    }
    if let Some(block_rootfs) = config.block_rootfs.as_ref() {
        let dirs = &installation.program_dirs;
        findings.push(tool(dirs, "mkfs.erofs", "erofs-utils"));
        if block_rootfs.writable_disk_mib > 0 {
            findings.push(tool(dirs, "mkfs.ext4", "e2fsprogs"));
        }
        findings.push(layer_cache(Path::new(&block_rootfs.layer_cache_path)));
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

/// A program that makes file systems, of Debian's `package`.
fn tool(dirs: &[PathBuf], name: &str, package: &str) -> Finding {
    match program::find(dirs, name) {
        Some(path) => Finding::pass(name, path.display().to_string()),
        None => Finding::fail(name, "not on the PATH: it makes disks of images", format!("install {package}")),
    }
}

/// The first sandbox makes the folder.
fn layer_cache(folder: &Path) -> Finding {
    let there = folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(folder);
    let (shown, place) = (folder.display(), there.display());
    let able = match there.is_dir() {
        true => access(there, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|errno| errno.desc()),
        false => Err("not a folder"),
    };
    match able {
        Ok(()) => Finding::pass("layer cache", shown.to_string()),
        Err(why) => {
            let found = format!("{shown} cannot be written: {place}: {why}");
            Finding::fail("layer cache", found, "set `layer_cache_path` to a folder that can be written")
        }
    }
}

/// Of all programs of one user: as many sandboxes follow the host at once.
const ENOUGH_INSTANCES: u32 = 1024;

/// What is copied into guests that see no directory of the host is watched, to be copied again.
fn inotify(instances: &str) -> Finding {
    let found = format!("fs.inotify.max_user_instances is {}", instances.trim());
    if instances.trim().parse().is_ok_and(|instances: u32| instances < ENOUGH_INSTANCES) {
        let found = format!("{found}: a sandbox takes one to follow files that it copies");
        return Finding::warn("inotify", found, format!("sysctl fs.inotify.max_user_instances={ENOUGH_INSTANCES}"));
    }
    Finding::pass("inotify", found)
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

    #[test]
    fn what_makes_disks_is_named_with_its_package() {
        let told = tool(&["/nonexistent".into()], "mkfs.erofs", "erofs-utils");
        assert_eq!((told.verdict, told.remedy.as_deref()), (Verdict::Fail, Some("install erofs-utils")));
        assert_eq!(tool(&["/bin".into()], "sh", "dash"), Finding::pass("sh", "/bin/sh"));
    }

    #[test]
    fn a_layer_cache_may_still_have_to_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a/b");
        assert_eq!(layer_cache(&folder), Finding::pass("layer cache", folder.display().to_string()));
    }

    #[test]
    fn a_layer_cache_that_cannot_be_written_is_told_with_what_is_in_the_way() {
        let told = layer_cache(Path::new("/proc/self/status/layers"));
        let found = "/proc/self/status/layers cannot be written: /proc/self/status: not a folder";
        assert_eq!((told.verdict, told.found.as_str()), (Verdict::Fail, found));
    }

    #[test]
    fn few_instances_of_inotify_are_a_warning_with_how_to_have_more() {
        assert_eq!(inotify("128\n").remedy.as_deref(), Some("sysctl fs.inotify.max_user_instances=1024"));
        assert_eq!(inotify("1024\n"), Finding::pass("inotify", "fs.inotify.max_user_instances is 1024"));
    }

    #[tokio::test]
    async fn a_missing_virtiofsd_is_named_with_its_key() {
        let told = virtiofsd("/nonexistent/virtiofsd").await;
        assert!(told.found.contains("/nonexistent/virtiofsd"), "{told:?}");
        assert!(told.remedy.unwrap().contains("virtio_fs_daemon"));
    }
}
