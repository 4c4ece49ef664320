//! Where values come from: the lookup order, drop-ins, symlinks, defaults, the backend.

mod host;

use std::{fs, os::unix::fs::symlink};

use caisson_config_service::resolve::Resolved;
use host::{Host, SHIPPED};

fn origin(resolved: &Resolved, key: &str) -> String {
    resolved.settings.iter().find(|setting| setting.key == key).unwrap().origin()
}

#[tokio::test]
async fn the_smallest_configuration_gets_every_default() {
    let host = Host::new();
    let file = host.configure("");
    let config = host.resolve().await.unwrap().config;
    assert_eq!(config.hypervisor, "qemu");
    assert_eq!((config.vm.vcpus, config.vm.memory_mib, config.vm.kernel_params.as_str()), (1, 256, ""));
    assert_eq!((config.shared_fs.cache.as_str(), config.shared_fs.extra_args.len()), ("auto", 1));
    assert_eq!((config.timeouts.create_ms, config.timeouts.shutdown_ms), (10_000, 2_000));
    assert_eq!((config.log_level.as_str(), config.debug_console, config.options.as_str()), ("info", false, ""));
    assert_eq!(config.origin, file.display().to_string());
}

#[tokio::test]
async fn drop_ins_are_laid_over_in_the_order_of_their_names() {
    let host = Host::new();
    host.configure("default_vcpus = 1\ndefault_memory = 512");
    host.write("etc/config.d/20-more.toml", "[hypervisor.qemu]\ndefault_vcpus = 3");
    host.write("etc/config.d/10-less.toml", "[hypervisor.qemu]\ndefault_vcpus = 2\nkernel_params = \"quiet\"");
    let resolved = host.resolve().await.unwrap();
    let vm = &resolved.config.vm;
    assert_eq!((vm.vcpus, vm.memory_mib, vm.kernel_params.as_str()), (3, 512, "quiet"));
    let more = format!("{}:2", host.path("etc/config.d/20-more.toml").display());
    assert_eq!(origin(&resolved, "hypervisor.qemu.default_vcpus"), more);
    assert_eq!(origin(&resolved, "hypervisor.qemu.default_maxvcpus"), "default");
}

#[tokio::test]
async fn katas_agent_table_is_the_agents() {
    let host = Host::new();
    host.configure("[agent]\ndebug_console_enabled = false");
    host.write("etc/config.d/a.toml", "[agent.kata]\ndebug_console_enabled = true");
    let resolved = host.resolve().await.unwrap();
    assert!(resolved.config.debug_console);
    let written = format!("{}:2", host.path("etc/config.d/a.toml").display());
    assert_eq!(origin(&resolved, "agent.debug_console_enabled"), written);
}

#[tokio::test]
async fn a_drop_in_replaces_an_array() {
    let host = Host::new();
    host.configure("virtio_fs_extra_args = [\"-a\", \"-b\"]");
    host.write("etc/config.d/a.toml", "[hypervisor.qemu]\nvirtio_fs_extra_args = [\"-c\"]");
    assert_eq!(host.resolve().await.unwrap().config.shared_fs.extra_args, ["-c"]);
}

#[tokio::test]
async fn a_drop_in_takes_the_initrd_back() {
    let host = Host::new();
    host.configure("initrd = \"DIR/initrd\"");
    host.write("etc/config.d/a.toml", "[hypervisor.qemu]\ninitrd = \"\"\nimage = \"DIR/initrd\"");
    let vm = host.resolve().await.unwrap().config.vm;
    assert_eq!((vm.initrd.as_str(), vm.image.as_str()), ("", host.path("initrd").to_str().unwrap()));
}

#[tokio::test]
async fn a_mistake_in_a_drop_in_is_located_there() {
    let host = Host::new();
    host.configure("");
    host.write("etc/config.d/a.toml", "# comment\n[hypervisor.qemu]\n  default_vcpus = true");
    let told = host.resolve().await.unwrap_err();
    assert!(told[0].starts_with("DIR/etc/config.d/a.toml:3:3: hypervisor.qemu.default_vcpus: found true"), "{told:?}");
}

#[tokio::test]
async fn what_editors_leave_behind_is_no_drop_in() {
    let host = Host::new();
    host.configure("");
    host.write("etc/config.d/a.toml~", "nonsense");
    host.write("etc/config.d/.a.toml.swp", "nonsense");
    symlink("user@host.1234", host.path("etc/config.d/.#a.toml")).unwrap();
    assert!(host.resolve().await.is_ok());
}

#[tokio::test]
async fn a_drop_in_may_be_a_symlink() {
    let host = Host::new();
    host.configure("");
    let target = host.write("elsewhere", "[hypervisor.qemu]\ndefault_vcpus = 2");
    symlink(target, host.path("etc/config.d/a.toml")).unwrap();
    assert_eq!(host.resolve().await.unwrap().config.vm.vcpus, 2);
}

#[tokio::test]
async fn a_drop_in_that_links_to_nothing_is_a_mistake() {
    let host = Host::new();
    host.configure("");
    symlink("/nowhere", host.path("etc/config.d/a.toml")).unwrap();
    let told = host.resolve().await.unwrap_err();
    assert_eq!(told, ["read DIR/etc/config.d/a.toml: No such file or directory (os error 2)"]);
}

#[tokio::test]
async fn drop_ins_lie_beside_the_file_that_a_symlink_names() {
    let host = Host::new();
    let file = host.configure("");
    host.write("etc/config.d/a.toml", "[hypervisor.qemu]\ndefault_vcpus = 2");
    symlink(&file, host.path("link.toml")).unwrap();
    let config = host.resolve_file(Some(&host.path("link.toml"))).await.unwrap().config;
    assert_eq!((config.vm.vcpus, config.origin), (2, file.display().to_string()));
}

#[tokio::test]
async fn without_an_administrators_file_the_shipped_one_counts() {
    let host = Host::new();
    fs::rename(host.configure(""), host.path(SHIPPED)).unwrap();
    assert_eq!(host.resolve().await.unwrap().config.origin, host.path(SHIPPED).display().to_string());
}

#[tokio::test]
async fn the_administrators_drop_ins_are_laid_over_the_shipped_file_too() {
    let host = Host::new();
    host.configure_as(SHIPPED, "");
    host.write("etc/config.d/a.toml", "[hypervisor.qemu]\ndefault_vcpus = 2");
    assert_eq!(host.resolve().await.unwrap().config.vm.vcpus, 2);
}

#[tokio::test]
async fn an_administrators_link_to_nothing_is_a_mistake() {
    let host = Host::new();
    fs::rename(host.configure(""), host.path(SHIPPED)).unwrap();
    symlink("/nowhere", host.path("etc/configuration.toml")).unwrap();
    let told = host.resolve().await.unwrap_err();
    assert_eq!(told, ["read DIR/etc/configuration.toml: No such file or directory (os error 2)"]);
}

#[tokio::test]
async fn a_short_name_reaches_the_same_launcher_and_table() {
    let host = Host::new();
    host.launcher("cloud-hypervisor", "[]");
    host.write(
        "etc/configuration.toml",
        "[hypervisor.cloud-hypervisor]\nkernel = \"DIR/kernel\"\nshared_fs = \"none\"",
    );
    host.write("etc/config.d/a.toml", "[hypervisor.clh]\ndefault_vcpus = 2");
    let config = host.resolve().await.unwrap().config;
    assert_eq!((config.hypervisor.as_str(), config.vm.vcpus), ("cloud-hypervisor", 2));
}

#[tokio::test]
async fn one_line_chooses_among_several_hypervisors() {
    let host = Host::new();
    host.launcher("firecracker", r#"[{"key": "shared_fs", "type": "string", "default": "none"}]"#);
    host.configure("[hypervisor.firecracker]\nkernel = \"DIR/kernel\"\n[runtime]\nhypervisor = \"fc\"");
    let config = host.resolve().await.unwrap().config;
    assert_eq!(config.hypervisor, "firecracker");
    assert!(config.shared_fs.is_none(), "the launcher's default for a common key holds");
}

#[tokio::test]
async fn a_hypervisor_that_nobody_heard_of_needs_only_a_launcher() {
    let host = Host::new();
    host.launcher("bhyve", r#"[{"key": "flavour", "type": "string", "default": "plain"}]"#);
    host.write(
        "etc/configuration.toml",
        "[hypervisor.bhyve]\nkernel = \"DIR/kernel\"\nshared_fs = \"none\"\nflavour = \"x\"",
    );
    let config = host.resolve().await.unwrap().config;
    assert_eq!((config.hypervisor.as_str(), config.options.as_str()), ("bhyve", "flavour = \"x\"\n"));
}

#[tokio::test]
async fn the_backend_gets_its_own_keys_and_only_those_that_are_written() {
    let host = Host::new();
    host.configure("default_vcpus = 2\nqueue_size = 64\nmachine_type = \"q35\"");
    let options: toml::Table = host.resolve().await.unwrap().config.options.parse().unwrap();
    assert_eq!(
        options,
        toml::toml! { machine_type = "q35"
        queue_size = 64 }
    );
}

#[tokio::test]
async fn a_backends_default_is_shown_as_a_default() {
    let host = Host::new();
    host.configure("");
    let resolved = host.resolve().await.unwrap();
    let setting = resolved.settings.iter().find(|setting| setting.key == "hypervisor.qemu.machine_type").unwrap();
    assert_eq!((setting.value.to_string().as_str(), setting.origin().as_str()), ("\"microvm\"", "default"));
}

#[tokio::test]
async fn without_a_shared_file_system_its_daemon_may_be_missing() {
    let host = Host::new();
    host.write("etc/configuration.toml", "[hypervisor.qemu]\nkernel = \"DIR/kernel\"\nshared_fs = \"none\"");
    assert!(host.resolve().await.unwrap().config.shared_fs.is_none());
}

#[tokio::test]
async fn minus_one_is_every_cpu_of_the_host() {
    let host = Host::new();
    host.configure("default_vcpus = -1");
    let cpus = std::thread::available_parallelism().unwrap().get();
    assert_eq!(host.resolve().await.unwrap().config.vm.vcpus as usize, cpus);
}
