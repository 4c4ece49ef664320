//! What pods may change, and the exact words where they may not.

mod host;

use host::Host;

const KATA: &str = "io.katacontainers.config.hypervisor.default_memory";
const OURS: &str = "io.caisson.config.hypervisor.default_memory";

fn host(more: &str) -> Host {
    let host = Host::new();
    host.configure(more);
    host
}

#[tokio::test]
async fn what_is_enabled_is_laid_over_the_files() {
    let host = host("default_memory = 512\nenable_annotations = [\"default_memory\"]");
    let resolved = host.resolve_for(&[(OURS, "1024")]).await.unwrap();
    assert_eq!(resolved.config.vm.memory_mib, 1024);
    let setting = resolved.settings.iter().find(|setting| setting.key == "hypervisor.qemu.default_memory").unwrap();
    assert_eq!(setting.origin(), format!("annotation {OURS}"));
}

#[tokio::test]
async fn katas_name_means_the_same() {
    let host = host("enable_annotations = [\"default_*\"]");
    let annotations = [(KATA, "1024"), ("io.katacontainers.config.hypervisor.default_max_vcpus", "4")];
    let config = host.resolve_for(&annotations).await.unwrap().config;
    assert_eq!((config.vm.memory_mib, config.vm.max_vcpus), (1024, 4));
}

#[tokio::test]
async fn both_names_may_say_the_same() {
    let host = host("enable_annotations = [\"default_memory\"]");
    assert_eq!(host.resolve_for(&[(OURS, "1024"), (KATA, "1024")]).await.unwrap().config.vm.memory_mib, 1024);
}

#[tokio::test]
async fn other_peoples_annotations_are_not_looked_at() {
    let host = host("");
    let annotations = [("io.kubernetes.cri.sandbox-id", "x"), ("io.katacontainers.pkg.oci.bundle_path", "/x")];
    assert!(host.resolve_for(&annotations).await.is_ok());
}

#[tokio::test]
async fn kernel_parameters_are_added_to_the_administrators() {
    let host = host("kernel_params = \"quiet\"\nenable_annotations = [\"kernel_params\"]");
    let annotations = [("io.katacontainers.config.hypervisor.kernel_params", "debug x=1")];
    assert_eq!(host.resolve_for(&annotations).await.unwrap().config.vm.kernel_params, "quiet debug x=1");
}

#[tokio::test]
async fn a_list_and_a_flag_have_their_toml_form() {
    let host = host("enable_annotations = [\"virtio_fs_extra_args\", \"agent.*\"]");
    let annotations = [
        ("io.caisson.config.hypervisor.virtio_fs_extra_args", "[\"-o\", \"x\"]"),
        ("io.katacontainers.config.agent.debug_console_enabled", "true"),
    ];
    let config = host.resolve_for(&annotations).await.unwrap().config;
    assert_eq!((config.shared_fs.extra_args.len(), config.debug_console), (2, true));
}

#[tokio::test]
async fn a_launchers_own_key_reaches_the_launcher() {
    let host = host("enable_annotations = [\"machine_type\", \"queue_size\"]");
    let annotations =
        [("io.caisson.config.hypervisor.machine_type", "q35"), ("io.caisson.config.hypervisor.queue_size", "64")];
    let options = host.resolve_for(&annotations).await.unwrap().config.options;
    assert_eq!(options, "machine_type = \"q35\"\nqueue_size = 64\n");
}

#[tokio::test]
async fn a_path_below_a_valid_one_is_taken() {
    let host = host("enable_annotations = [\"initrd\"]\nvalid_initrd_paths = [\"DIR/init*\"]");
    let annotations = [("io.caisson.config.hypervisor.initrd", "DIR/initrd")];
    let initrd = host.resolve_for(&annotations).await.unwrap().config.vm.initrd.clone();
    assert_eq!(host.shortened(&initrd), "DIR/initrd");
}

#[tokio::test]
async fn a_pod_may_choose_the_hypervisor_and_meets_its_permissions() {
    let host = host("enable_annotations = [\"runtime.hypervisor\"]");
    host.launcher("firecracker", r#"[{"key": "shared_fs", "default": "none"}]"#);
    let table = "[hypervisor.fc]\nkernel = \"DIR/kernel\"\nenable_annotations = [\"default_vcpus\"]";
    host.write("etc/config.d/fc.toml", table);
    let annotations = [
        ("io.katacontainers.config.runtime.hypervisor_name", "fc"),
        ("io.caisson.config.hypervisor.default_vcpus", "2"),
    ];
    let config = host.resolve_for(&annotations).await.unwrap().config;
    assert_eq!((config.hypervisor.as_str(), config.vm.vcpus), ("firecracker", 2));
}

#[tokio::test]
async fn a_pods_limits_make_its_sandbox_larger() {
    let host = host("default_vcpus = 0.5");
    let annotations = [
        ("io.kubernetes.cri.sandbox-cpu-quota", "50000"),
        ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
        ("io.kubernetes.cri.sandbox-memory", "268435456"),
    ];
    let config = host.resolve_for(&annotations).await.unwrap().config;
    assert_eq!((config.vm.vcpus, config.vm.memory_mib), (1, 512));
}

/// One test: the file's last lines, one annotation, and what is told.
macro_rules! refused {
    ($name:ident: $written:expr, $annotation:expr, $value:expr => $($told:expr),+ $(,)?) => {
        #[tokio::test]
        async fn $name() {
            let host = host($written);
            let annotation = concat!("io.caisson.config.", $annotation);
            assert_eq!(host.resolve_for(&[(annotation, $value)]).await.unwrap_err(), [$($told),+]);
        }
    };
}

refused!(without_a_list_the_message_says_where_to_begin_one:
    "", "hypervisor.default_memory", "1024" =>
    "annotation io.caisson.config.hypervisor.default_memory: not allowed; add enable_annotations with \"default_memory\" to [hypervisor.qemu] at DIR/etc/configuration.toml:1");

refused!(with_a_list_the_message_says_which_line_to_change:
    "enable_annotations = [\"default_vcpus\"]", "hypervisor.default_memory", "1024" =>
    "annotation io.caisson.config.hypervisor.default_memory: not allowed; add \"default_memory\" to enable_annotations at DIR/etc/configuration.toml:4");

refused!(a_part_of_a_name_allows_nothing:
    "enable_annotations = [\"path\"]\nvalid_hypervisor_paths = [\"/usr/bin/*\"]", "hypervisor.virtio_fs_daemon", "/x" =>
    "annotation io.caisson.config.hypervisor.virtio_fs_daemon: not allowed; add \"virtio_fs_daemon\" to enable_annotations at DIR/etc/configuration.toml:4");

refused!(a_star_does_not_reach_the_agent:
    "enable_annotations = [\"*\"]", "agent.debug_console_enabled", "true" =>
    "annotation io.caisson.config.agent.debug_console_enabled: not allowed; add \"agent.debug_console_enabled\" to enable_annotations at DIR/etc/configuration.toml:4");

refused!(a_path_needs_a_list_of_its_own:
    "enable_annotations = [\"*\"]", "hypervisor.kernel", "/tmp/vmlinux" =>
    "annotation io.caisson.config.hypervisor.kernel: \"/tmp/vmlinux\" is not allowed; add valid_kernel_paths with a glob of such paths to [hypervisor.qemu] at DIR/etc/configuration.toml:1");

refused!(a_path_elsewhere_is_refused_with_the_line_of_the_list:
    "enable_annotations = [\"kernel\"]\nvalid_kernel_paths = [\"/srv/*\"]", "hypervisor.kernel", "/srv/a/vmlinux" =>
    "annotation io.caisson.config.hypervisor.kernel: \"/srv/a/vmlinux\" is not allowed; add a glob of such paths to valid_kernel_paths at DIR/etc/configuration.toml:5");

refused!(a_path_with_a_way_out_is_refused:
    "enable_annotations = [\"kernel\"]\nvalid_kernel_paths = [\"/srv/*/vmlinux\"]", "hypervisor.kernel", "/srv/../vmlinux" =>
    "annotation io.caisson.config.hypervisor.kernel: \"/srv/../vmlinux\" is not allowed; add a glob of such paths to valid_kernel_paths at DIR/etc/configuration.toml:5");

refused!(an_allowed_path_must_exist:
    "enable_annotations = [\"initrd\"]\nvalid_initrd_paths = [\"/no/*\"]", "hypervisor.initrd", "/no/initrd" =>
    "annotation io.caisson.config.hypervisor.initrd: hypervisor.qemu.initrd: /no/initrd does not exist");

refused!(an_annotation_does_not_allow_annotations:
    "enable_annotations = [\"*\"]", "hypervisor.enable_annotations", "[\"agent.*\"]" =>
    "annotation io.caisson.config.hypervisor.enable_annotations: only a file may say this");

refused!(an_annotation_does_not_move_the_cache:
    "enable_annotations = [\"*\"]", "hypervisor.layer_cache_path", "/etc" =>
    "annotation io.caisson.config.hypervisor.layer_cache_path: only a file may say this");

refused!(a_misspelt_key_gets_the_nearest_one:
    "enable_annotations = [\"*\"]", "hypervisor.default_memoy", "1024" =>
    "annotation io.caisson.config.hypervisor.default_memoy: unknown key \"default_memoy\"; did you mean \"default_memory\"?");

refused!(a_misspelt_table_gets_the_nearest_one:
    "", "hypervsor.default_memory", "1024" =>
    "annotation io.caisson.config.hypervsor.default_memory: unknown table \"hypervsor\"; did you mean \"hypervisor\"?");

refused!(a_value_out_of_range_is_refused_as_in_a_file:
    "enable_annotations = [\"default_memory\"]", "hypervisor.default_memory", "1" =>
    "annotation io.caisson.config.hypervisor.default_memory: hypervisor.qemu.default_memory: found 1 (an integer), expected a whole number of MiB from 32 to 16777216");

refused!(a_value_of_the_wrong_form_is_quoted:
    "enable_annotations = [\"default_memory\"]", "hypervisor.default_memory", "plenty" =>
    "annotation io.caisson.config.hypervisor.default_memory: hypervisor.qemu.default_memory: found \"plenty\" (a string), expected a whole number of MiB from 32 to 16777216");

refused!(toml_does_not_leave_its_value:
    "enable_annotations = [\"virtio_fs_extra_args\"]", "hypervisor.virtio_fs_extra_args", "[]\nkernel = \"/x\"" =>
    "annotation io.caisson.config.hypervisor.virtio_fs_extra_args: hypervisor.qemu.virtio_fs_extra_args: found \"[]\\nkernel = \\\"/x\\\"\" (a string), expected an array of strings");

refused!(a_hypervisor_that_is_not_installed_is_named:
    "enable_annotations = [\"runtime.hypervisor\"]", "runtime.hypervisor", "acrn" =>
    "annotation io.caisson.config.runtime.hypervisor: runtime.hypervisor: caisson-vmm-acrn is not installed: looked in DIR/bin");

#[tokio::test]
async fn two_names_with_two_values_contradict_each_other() {
    let host = host("enable_annotations = [\"default_memory\"]");
    assert_eq!(
        host.resolve_for(&[(OURS, "1024"), (KATA, "2048")]).await.unwrap_err(),
        ["annotation io.katacontainers.config.hypervisor.default_memory: found \"2048\", but annotation \
          io.caisson.config.hypervisor.default_memory says \"1024\""]
    );
}

#[tokio::test]
async fn every_refusal_is_told_at_once() {
    let host = host("enable_annotations = [\"default_vcpus\"]");
    let annotations = [
        (OURS, "1024"),
        ("io.caisson.config.hypervisor.kernel", "/x"),
        ("io.caisson.config.hypervisor.default_vcpus", "2"),
        ("io.caisson.config.agent.debug_console_enabled", "true"),
    ];
    assert_eq!(host.resolve_for(&annotations).await.unwrap_err().len(), 3);
}

#[tokio::test]
async fn a_huge_value_is_not_read() {
    let host = host("enable_annotations = [\"*\"]");
    let value = "[".repeat(20_000);
    assert_eq!(
        host.resolve_for(&[("io.caisson.config.hypervisor.virtio_fs_extra_args", &value)]).await.unwrap_err(),
        ["annotation io.caisson.config.hypervisor.virtio_fs_extra_args: longer than 16 KiB"]
    );
}
