//! The files that are installed, the page that explains them, and the types that read them say the same.

mod host;

use std::{env, fs, path::Path};

use caisson_config_service::{defaults, launchers::LauncherOption, reference};
use host::Host;

/// Set, the checked-in files are written instead of compared.
const BLESS: &str = "CAISSON_BLESS";

/// What a launcher tells, as its own test keeps it.
fn options_text(hypervisor: &str) -> String {
    fs::read_to_string(in_source(&format!("defaults/options/{hypervisor}.json"))).unwrap()
}

fn options(hypervisor: &str) -> Vec<LauncherOption> {
    serde_json::from_str(&options_text(hypervisor)).unwrap()
}

fn in_source(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn assert_checked_in(file: &str, text: &str) {
    let path = in_source(file);
    if env::var_os(BLESS).is_some() {
        fs::write(&path, text).unwrap();
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    assert!(there == text, "{file} is not what the types say; run this test with {BLESS}=1 and look at the difference");
}

fn assert_file(name: &str) {
    let file = defaults::FILES.iter().find(|file| file.name == name).unwrap();
    let text = defaults::text(file.hypervisor, &options(file.hypervisor), Path::new("/usr"));
    assert_checked_in(&format!("defaults/{name}"), &text);
}

#[test]
fn the_file_for_qemu_is_checked_in() {
    assert_file("configuration-qemu.toml");
}

#[test]
fn the_file_for_cloud_hypervisor_is_checked_in() {
    assert_file("configuration-clh.toml");
}

#[test]
fn the_file_for_firecracker_is_checked_in() {
    assert_file("configuration-fc.toml");
}

#[test]
fn the_file_for_the_builtin_vmm_is_checked_in() {
    assert_file("configuration-builtin.toml");
}

#[test]
fn the_file_for_stratovirt_is_checked_in() {
    assert_file("configuration-stratovirt.toml");
}

#[test]
fn the_file_for_acrn_is_checked_in() {
    assert_file("configuration-acrn.toml");
}

/// Launchers refuse the other format: StratoVirt's and ACRN's a vmlinux, that of an old Firecracker a bzImage.
#[test]
fn each_file_names_a_kernel_of_a_format_that_its_hypervisor_boots() {
    for file in defaults::FILES {
        let text = defaults::text(file.hypervisor, &options(file.hypervisor), Path::new("/opt/c"));
        let table: toml::Table = toml::from_str(&text).unwrap();
        let format = if ["stratovirt", "acrn"].contains(&file.hypervisor) { "bzImage" } else { "vmlinux" };
        let kernel = table["hypervisor"][file.hypervisor]["kernel"].as_str();
        assert_eq!(kernel, Some(format!("/opt/c/share/caisson/{format}").as_str()), "{}", file.name);
    }
}

#[test]
fn the_reference_page_is_checked_in() {
    let hypervisors = ["qemu", "cloud-hypervisor", "firecracker", "builtin", "stratovirt", "acrn"];
    assert_checked_in("reference.md", &reference::page(&hypervisors.map(|name| (name, options(name)))));
}

/// A host on which the file for `hypervisor` has no problem, and that file's text.
fn host_for(hypervisor: &str) -> (Host, String) {
    let host = Host::new();
    for dir in ["usr/bin", "usr/share/caisson"] {
        fs::create_dir_all(host.path(dir)).unwrap();
    }
    for program in ["bin/qemu-system-x86_64", "bin/cloud-hypervisor", "bin/firecracker", "bin/stratovirt"] {
        host.program(&format!("usr/{program}"), "exit 1");
    }
    for program in ["acrn-dm", "iasl", "jailer"] {
        host.program(&format!("usr/bin/{program}"), "exit 1");
    }
    host.write("usr/share/caisson/vmlinux", "");
    host.write("usr/share/caisson/bzImage", "");
    host.write("usr/share/caisson/initrd.img", "");
    let told = options_text(hypervisor).replace("/usr/", "DIR/usr/");
    host.launcher(hypervisor, &host.text(&told));
    let text = defaults::text(hypervisor, &options(hypervisor), Path::new("/usr"));
    (host, text.replace(" \"/usr/", " \"DIR/usr/"))
}

/// Every line that shows a default, switched on by itself, changes nothing.
async fn assert_defaults(hypervisor: &str) {
    let (host, text) = host_for(hypervisor);
    host.write("etc/configuration.toml", &text);
    let bare = host.resolve().await.unwrap();
    let is_default =
        |line: &&str| line.strip_prefix('#').is_some_and(|key| key.starts_with(|c: char| c.is_lowercase()));
    let defaults: Vec<_> = text.lines().filter(is_default).collect();
    assert!(defaults.len() > 20, "{defaults:?}");
    for line in defaults {
        host.write("etc/configuration.toml", &text.replace(&format!("\n{line}\n"), &format!("\n{}\n", &line[1..])));
        match host.resolve().await {
            Ok(resolved) => assert_eq!(without_written_options(&resolved), without_written_options(&bare), "{line}"),
            Err(problems) => assert!(matches!(&problems[..], [one] if one.contains("has no effect")), "{problems:?}"),
        }
    }
}

#[tokio::test]
async fn the_virtiofsd_that_is_found_is_in_force() {
    let host = Host::new();
    host.write("etc/configuration.toml", "[hypervisor.qemu]\nkernel = \"DIR/kernel\"");
    let resolved = host.resolve().await.unwrap();
    let found = host.text("DIR/bin/virtiofsd");
    assert_eq!(resolved.config.shared_fs.daemon_path, found);
    let setting = resolved.settings.iter().find(|setting| setting.key == "hypervisor.qemu.virtio_fs_daemon").unwrap();
    assert_eq!((setting.value.as_str(), setting.origin()), (Some(found.as_str()), "default".to_owned()));
}

/// Every value in force; `options` holds the same values, but only those that are written.
fn without_written_options(resolved: &caisson_config_service::resolve::Resolved) -> Vec<String> {
    resolved.settings.iter().map(|setting| format!("{} = {}", setting.key, setting.value)).collect()
}

#[tokio::test]
async fn the_defaults_shown_for_qemu_are_in_force() {
    assert_defaults("qemu").await;
}

#[tokio::test]
async fn the_defaults_shown_for_cloud_hypervisor_are_in_force() {
    assert_defaults("cloud-hypervisor").await;
}

#[tokio::test]
async fn the_defaults_shown_for_firecracker_are_in_force() {
    assert_defaults("firecracker").await;
}

#[tokio::test]
async fn the_defaults_shown_for_the_builtin_vmm_are_in_force() {
    assert_defaults("builtin").await;
}

#[tokio::test]
async fn the_defaults_shown_for_stratovirt_are_in_force() {
    assert_defaults("stratovirt").await;
}

#[tokio::test]
async fn the_defaults_shown_for_acrn_are_in_force() {
    assert_defaults("acrn").await;
}

#[tokio::test]
async fn a_host_where_the_builtin_vmm_runs_gets_it() {
    let host = Host::new();
    host.launcher("builtin", "[]");
    let recommended = defaults::recommend(&host.installation()).await;
    assert_eq!((recommended.file.name, recommended.file.hypervisor), ("configuration-builtin.toml", "builtin"));
}

#[tokio::test]
async fn a_host_where_it_cannot_run_gets_qemu_and_hears_why() {
    let host = Host::new();
    host.able_launcher("builtin", "[]", r#"{"accelerator": "", "accelerator_reason": "there is no /dev/kvm"}"#);
    let recommended = defaults::recommend(&host.installation()).await;
    assert_eq!(
        (recommended.file.name, recommended.reason.as_str()),
        ("configuration-qemu.toml", "the built-in VMM is no choice: cannot run here: there is no /dev/kvm")
    );
}

#[tokio::test]
async fn a_host_without_it_gets_qemu() {
    let recommended = defaults::recommend(&Host::new().installation()).await;
    assert_eq!(
        (recommended.file.hypervisor, recommended.reason.as_str()),
        ("qemu", "the built-in VMM is not installed")
    );
}
