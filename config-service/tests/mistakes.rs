//! What people read when their configuration is wrong: the exact words.

mod host;

use caisson_config_service::resolve::Resolver;
use host::Host;

/// One test: what is written below the host's files, and every problem that is told.
macro_rules! mistake {
    ($name:ident: $written:expr => $($told:expr),+ $(,)?) => {
        #[tokio::test]
        async fn $name() {
            let host = Host::new();
            host.configure($written);
            assert_eq!(host.resolve().await.unwrap_err(), [$($told),+]);
        }
    };
}

mistake!(an_unknown_key_gets_the_nearest_one:
    "kernal_params = \"quiet\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.kernal_params: unknown key; did you mean \"kernel_params\"?");

mistake!(a_backends_key_is_suggested_too:
    "machine_typ = \"q35\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.machine_typ: unknown key; did you mean \"machine_type\"?");

mistake!(a_key_of_another_table_is_sent_there:
    "[agent]\nlog_level = \"debug\"" =>
    "DIR/etc/configuration.toml:5:1: agent.log_level: unknown key; it belongs to [runtime]");

mistake!(a_key_like_no_other_gets_the_list:
    "[agent]\nzzzzzzzz = 1" =>
    "DIR/etc/configuration.toml:5:1: agent.zzzzzzzz: unknown key; accepted: debug_console_enabled");

mistake!(an_unknown_table_gets_the_nearest_one:
    "[runtim]\nlog_level = \"info\"" =>
    "DIR/etc/configuration.toml:4:2: runtim: unknown table; did you mean \"runtime\"?");

mistake!(a_string_is_no_number:
    "default_vcpus = \"two\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_vcpus: found \"two\" (a string), expected a number from -1 to 1024");

mistake!(a_float_is_no_whole_number:
    "default_maxvcpus = 1.5" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_maxvcpus: found 1.5 (a float), expected a whole number from 0 to 1024");

mistake!(a_number_that_is_none_is_refused:
    "default_vcpus = nan" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_vcpus: found nan (a float), expected a number from -1 to 1024");

mistake!(fewer_than_every_cpu_is_refused:
    "default_vcpus = -2" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_vcpus: found -2 (an integer), expected a number from -1 to 1024");

mistake!(a_date_is_no_number:
    "default_memory = 1979-05-27" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_memory: found 1979-05-27 (a date), expected a whole number of MiB from 32 to 16777216");

mistake!(a_size_with_a_unit_is_no_number:
    "default_memory = \"2GiB\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_memory: found \"2GiB\" (a string), expected a whole number of MiB from 32 to 16777216");

mistake!(a_number_out_of_range_is_refused:
    "default_memory = 16" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_memory: found 16 (an integer), expected a whole number of MiB from 32 to 16777216");

mistake!(a_number_that_no_integer_holds_is_refused_by_the_parser:
    "default_memory = 99999999999999999999" =>
    "DIR/etc/configuration.toml:4:18: found \"99999999999999999999\", expected a number that fits 64 bits");

mistake!(a_string_is_no_boolean:
    "[agent]\ndebug_console_enabled = \"true\"" =>
    "DIR/etc/configuration.toml:5:1: agent.debug_console_enabled: found \"true\" (a string), expected true or false");

mistake!(a_word_that_is_no_choice_gets_the_nearest_one:
    "virtio_fs_cache = \"alway\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.virtio_fs_cache: found \"alway\" (a string), expected one of \"auto\", \"always\", \"never\"; did you mean \"always\"?");

mistake!(an_array_with_a_number_is_no_array_of_strings:
    "virtio_fs_extra_args = [\"-d\", 7]" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.virtio_fs_extra_args: found 7 (an integer) among its elements, expected an array of strings");

mistake!(a_table_is_no_value:
    "[hypervisor.qemu.default_vcpus]\nsockets = 1" =>
    "DIR/etc/configuration.toml:4:18: hypervisor.qemu.default_vcpus: found a table, expected a number from -1 to 1024");

mistake!(a_line_break_does_not_reach_the_kernel:
    "kernel_params = \"quiet\\nroot=/dev/evil\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.kernel_params: found \"quiet\\nroot=/dev/evil\", expected a string without control characters");

mistake!(initrd_and_image_exclude_each_other:
    "initrd = \"DIR/initrd\"\nimage = \"DIR/initrd\"" =>
    "DIR/etc/configuration.toml:5:1: hypervisor.qemu.image: excludes hypervisor.qemu.initrd, which is set at DIR/etc/configuration.toml:4:1; set one of the two to \"\"");

mistake!(a_missing_file_is_named:
    "initrd = \"DIR/nothing\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.initrd: DIR/nothing does not exist");

mistake!(a_directory_is_no_file:
    "initrd = \"DIR/etc\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.initrd: DIR/etc is not a file");

mistake!(a_relative_path_is_refused:
    "initrd = \"initrd\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.initrd: initrd is not an absolute path");

mistake!(a_program_must_be_executable:
    "path = \"DIR/kernel\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.path: DIR/kernel is not executable");

mistake!(a_maximum_below_the_initial_value_is_refused:
    "default_vcpus = 4\ndefault_maxvcpus = 2\ndefault_maxmemory = 128" =>
    "DIR/etc/configuration.toml:5:1: hypervisor.qemu.default_maxvcpus: found 2, expected 0 or at least the 4 of hypervisor.qemu.default_vcpus at DIR/etc/configuration.toml:4:1",
    "DIR/etc/configuration.toml:6:1: hypervisor.qemu.default_maxmemory: found 128, expected 0 or at least the 256 of hypervisor.qemu.default_memory at its default");

mistake!(a_backends_number_is_no_string:
    "queue_size = \"many\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.queue_size: found \"many\" (a string), expected a power of two");

mistake!(a_backends_choice_is_checked:
    "machine_type = \"pc\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.machine_type: found \"pc\" (a string), expected one of \"microvm\", \"q35\"");

mistake!(a_backends_boolean_is_no_number:
    "enable_iothreads = 1" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.enable_iothreads: found 1 (an integer), expected true or false");

mistake!(two_hypervisors_need_a_choice:
    "[hypervisor.firecracker]" =>
    "DIR/etc/configuration.toml:4:13: hypervisor: there are tables for firecracker, qemu; choose with [runtime] hypervisor");

mistake!(a_misspelt_hypervisor_gets_the_nearest_one:
    "[runtime]\nhypervisor = \"qmeu\"" =>
    "DIR/etc/configuration.toml:5:1: runtime.hypervisor: caisson-vmm-qmeu is not installed: looked in DIR/bin; did you mean \"qemu\"?",
    "hypervisor.qmeu.kernel: /usr/share/caisson/vmlinux, the default, does not exist");

mistake!(a_hypervisor_is_no_path:
    "[runtime]\nhypervisor = \"../../evil\"" =>
    "DIR/etc/configuration.toml:5:1: runtime.hypervisor: \"../../evil\" is not the name of a hypervisor; accepted: qemu, cloud-hypervisor, firecracker, builtin, stratovirt, acrn");

mistake!(a_number_is_no_hypervisor:
    "[runtime]\nhypervisor = 1" =>
    "DIR/etc/configuration.toml:5:1: runtime.hypervisor: found 1 (an integer), expected a string");

mistake!(every_mistake_is_told_at_once:
    "default_vcpus = 0x10000\nimage = \"DIR/nothing\"\nbogus = 1\n[agent]\nx = 1\n[runtime]\nboot_timeout_ms = 0" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_vcpus: found 65536 (an integer), expected a number from -1 to 1024",
    "DIR/etc/configuration.toml:5:1: hypervisor.qemu.image: DIR/nothing does not exist",
    "DIR/etc/configuration.toml:6:1: hypervisor.qemu.bogus: unknown key; accepted: path, kernel, initrd, image, kernel_params, default_vcpus, default_maxvcpus, default_memory, default_maxmemory, enable_hugepages, confidential_guest, cold_plug_vfio, shared_fs, virtio_fs_daemon, virtio_fs_cache, virtio_fs_extra_args, rootfs, rootfs_writable, rootfs_disk_size, rootfs_max_disks, layer_cache_path, layer_cache_size, enable_annotations, valid_hypervisor_paths, valid_kernel_paths, valid_initrd_paths, valid_image_paths, valid_virtio_fs_daemon_paths, machine_type, block_device_driver, queue_size, enable_iothreads, hotplug_slots, extra_args, firmware_tool, valid_firmware_tool_paths",
    "DIR/etc/configuration.toml:8:1: agent.x: unknown key; accepted: debug_console_enabled",
    "DIR/etc/configuration.toml:10:1: runtime.boot_timeout_ms: found 0 (an integer), expected a whole number of ms from 1 to 3600000");

mistake!(every_syntax_error_is_told:
    "default_vcpus =\ndefault_memory = 1 2" =>
    "DIR/etc/configuration.toml:4:16: found the end of the line: string values must be quoted, expected literal string",
    "DIR/etc/configuration.toml:5:18: found \"1 2\": string values must be quoted, expected literal string");

mistake!(an_unterminated_string_is_located:
    "kernel_params = \"quiet" =>
    "DIR/etc/configuration.toml:4:23: found the end of the line: invalid basic string, expected `\"`");

mistake!(a_key_that_is_written_twice_is_located:
    "default_vcpus = 1\ndefault_vcpus = 2" =>
    "DIR/etc/configuration.toml:5:1: found \"default_vcpus = 2\": duplicate key");

mistake!(a_table_that_is_written_twice_is_located:
    "[agent]\n[agent]" =>
    "DIR/etc/configuration.toml:5:2: found \"agent]\": duplicate key");

mistake!(an_array_of_tables_is_no_table:
    "[[agent]]\ndebug_console_enabled = true" =>
    "DIR/etc/configuration.toml:4:3: agent: found an array, expected a table");

mistake!(a_key_of_katas_agent_table_that_there_is_not_gets_the_list:
    "[agent.kata]\ndial_timeout = 45" =>
    "DIR/etc/configuration.toml:5:1: agent.dial_timeout: unknown key; accepted: debug_console_enabled");

mistake!(one_agent_under_two_names_says_one_thing:
    "[agent]\ndebug_console_enabled = true\n[agent.kata]\ndebug_console_enabled = false" =>
    "DIR/etc/configuration.toml:7:1: agent.kata.debug_console_enabled: is another name of agent.debug_console_enabled, which stands at DIR/etc/configuration.toml:5:1; write one of them");

mistake!(another_agents_table_is_unknown:
    "[agent.other]\ndebug_console_enabled = true" =>
    "DIR/etc/configuration.toml:4:8: agent.other: unknown key; accepted: debug_console_enabled");

mistake!(a_key_below_a_value_is_refused:
    "[hypervisor.qemu.kernel_params]\nquiet = true" =>
    "DIR/etc/configuration.toml:4:18: hypervisor.qemu.kernel_params: found a table, expected a string");

mistake!(a_log_level_of_another_program_gets_the_list:
    "[runtime]\nlog_level = \"verbose\"" =>
    "DIR/etc/configuration.toml:5:1: runtime.log_level: found \"verbose\" (a string), expected one of \"error\", \"warn\", \"info\", \"debug\", \"trace\"");

mistake!(a_timeout_of_more_than_an_hour_is_refused:
    "[runtime]\ncreate_timeout_ms = 3600001" =>
    "DIR/etc/configuration.toml:5:1: runtime.create_timeout_ms: found 3600001 (an integer), expected a whole number of ms from 1 to 3600000");

mistake!(a_way_to_share_that_there_is_not_gets_the_list:
    "shared_fs = \"virtio-9p\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.shared_fs: found \"virtio-9p\" (a string), expected one of \"virtio-fs\", \"none\"; did you mean \"virtio-fs\"?");

mistake!(a_hypervisor_that_does_not_exist_is_named:
    "path = \"DIR/bin/qemu\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.path: DIR/bin/qemu does not exist");

mistake!(what_describes_disks_needs_disks:
    "rootfs_writable = \"disk\"\nrootfs_max_disks = 3" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.rootfs_writable: has no effect, since hypervisor.qemu.rootfs is \"auto\" at its default",
    "DIR/etc/configuration.toml:5:1: hypervisor.qemu.rootfs_max_disks: has no effect, since hypervisor.qemu.rootfs is \"auto\" at its default");

mistake!(a_disks_size_needs_a_disk:
    "rootfs = \"block\"\nrootfs_disk_size = 512" =>
    "DIR/etc/configuration.toml:5:1: hypervisor.qemu.rootfs_disk_size: has no effect, since hypervisor.qemu.rootfs_writable is \"memory\" at its default");

mistake!(one_disk_is_too_few:
    "rootfs = \"block\"\nrootfs_max_disks = 1" =>
    "DIR/etc/configuration.toml:5:1: hypervisor.qemu.rootfs_max_disks: found 1 (an integer), expected a whole number from 2 to 24");

mistake!(a_relative_cache_is_refused:
    "layer_cache_path = \"layers\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.layer_cache_path: found \"layers\" (a string), expected the absolute path of a folder");

mistake!(one_glob_is_no_array_of_globs:
    "enable_annotations = \"default_memory\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.enable_annotations: found \"default_memory\" (a string), expected an array of globs");

mistake!(a_glob_without_an_end_is_refused:
    "valid_kernel_paths = [\"/srv/[ab\"]" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.valid_kernel_paths: \"/srv/[ab\" is no glob: invalid range pattern");

mistake!(an_annotation_without_a_key_gets_the_nearest_one:
    "enable_annotations = [\"default_vcpus\", \"default_memori\"]" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.enable_annotations: \"default_memori\" is no key; did you mean \"default_memory\"?");

mistake!(a_path_that_nothing_allows_is_not_enabled:
    "enable_annotations = [\"kernel\"]" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.enable_annotations: \"kernel\" allows nothing without globs in valid_kernel_paths");

mistake!(a_backends_array_is_no_string:
    "extra_args = \"-nodefaults\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.extra_args: found \"-nodefaults\" (a string), expected an array");

mistake!(a_backends_number_has_bounds:
    "hotplug_slots = 300" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.hotplug_slots: found 300 (an integer), expected a whole number from 0 to 255");

mistake!(a_backends_choice_gets_the_nearest_word:
    "machine_type = \"microvn\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.machine_type: found \"microvn\" (a string), expected one of \"microvm\", \"q35\"; did you mean \"microvm\"?");

mistake!(a_backends_program_must_exist:
    "firmware_tool = \"/no/tool\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.firmware_tool: /no/tool does not exist");

mistake!(a_table_of_no_hypervisor_is_not_passed_over:
    "[hypervisor.qmeu]\n[runtime]\nhypervisor = \"qemu\"" =>
    "DIR/etc/configuration.toml:4:13: hypervisor.qmeu: caisson-vmm-qmeu is not installed: looked in DIR/bin; did you mean \"qemu\"?");

mistake!(a_table_that_is_not_in_use_is_checked_too:
    "[hypervisor.fc]\ndefault_memory = \"much\"\n[runtime]\nhypervisor = \"qemu\"" =>
    "DIR/etc/configuration.toml:5:1: hypervisor.firecracker.default_memory: found \"much\" (a string), expected a whole number of MiB from 32 to 16777216");

/// One test: what a hypervisor can do, what is written, and every problem that is told.
macro_rules! beyond {
    ($name:ident: $capabilities:expr, $written:expr => $($told:expr),+ $(,)?) => {
        #[tokio::test]
        async fn $name() {
            let host = Host::new();
            host.able_launcher("qemu", "[]", $capabilities);
            host.configure($written);
            assert_eq!(host.resolve().await.unwrap_err(), [$($told),+]);
        }
    };
}

beyond!(sharing_is_not_for_every_hypervisor:
    r#"{"version": "1.7", "devices": ["block"], "missing": {"fs": "it was built without"}}"#, "" =>
    "hypervisor.qemu.shared_fs: found \"virtio-fs\", but qemu 1.7 has no virtio-fs (it was built without); set it to \"none\"");

beyond!(growing_is_not_for_every_hypervisor:
    r#"{"version": "1.7", "devices": ["fs"]}"#, "default_maxvcpus = 4\ndefault_maxmemory = 512" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.default_maxvcpus: found 4, but qemu 1.7 has no vCPU hotplug; set it to 0",
    "DIR/etc/configuration.toml:5:1: hypervisor.qemu.default_maxmemory: found 512, but qemu 1.7 has no memory hotplug; set it to 0");

beyond!(disks_are_not_for_every_hypervisor:
    r#"{"devices": ["fs"]}"#, "image = \"DIR/initrd\"\nrootfs = \"block\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.image: found \"DIR/initrd\", but qemu has no disks; use initrd instead",
    "DIR/etc/configuration.toml:5:1: hypervisor.qemu.rootfs: found \"block\", but qemu has no disks; set it to \"virtio-fs\"");

beyond!(huge_pages_are_not_for_every_hypervisor:
    r#"{"version": "1.7", "devices": ["fs"], "missing": {"huge-pages": "it asks for none"}}"#, "enable_hugepages = true" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.enable_hugepages: found true, but qemu 1.7 has no huge pages (it asks for none); set it to false");

beyond!(confidential_guests_are_not_for_every_hypervisor:
    r#"{"version": "1.7", "devices": ["fs"], "missing": {"tdx": "not yet", "sev-snp": "not ever"}}"#, "confidential_guest = true" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.confidential_guest: found true, but qemu 1.7 has no confidential guests (tdx: not yet; sev-snp: not ever); set it to false");

beyond!(devices_of_the_host_are_not_for_every_hypervisor:
    r#"{"version": "1.7", "devices": ["fs"], "missing": {"cold-plug-vfio": "no port"}}"#, "cold_plug_vfio = \"root-port\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.cold_plug_vfio: found \"root-port\", but qemu 1.7 has no devices of the host (no port); set it to \"no-port\"");

mistake!(a_port_that_does_not_exist_gets_the_nearest_one:
    "cold_plug_vfio = \"rootport\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.cold_plug_vfio: found \"rootport\" (a string), expected one of \"no-port\", \"root-port\", \"switch-port\"; did you mean \"root-port\"?");

mistake!(a_word_for_huge_pages_is_refused:
    "enable_hugepages = \"yes\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.enable_hugepages: found \"yes\" (a string), expected true or false");

mistake!(a_driver_for_another_machine_is_refused:
    "block_device_driver = \"virtio-blk-pci\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.block_device_driver: found \"virtio-blk-pci\", which needs machine_type = \"q35\", but that is \"microvm\" at its default");

mistake!(a_driver_that_there_is_not_is_refused:
    "block_device_driver = \"virtio-scsi\"" =>
    "DIR/etc/configuration.toml:4:1: hypervisor.qemu.block_device_driver: found \"virtio-scsi\" (a string), expected one of \"virtio-blk\", \"virtio-blk-pci\"");

#[tokio::test]
async fn what_another_hypervisor_can_is_told() {
    let host = Host::new();
    let mmio =
        r#"[{"key": "block_device_driver", "type": "string", "default": "virtio-blk", "accepted": ["virtio-mmio"]}]"#;
    let able = r#"{"version": "1", "devices": ["fs"], "features": ["huge-pages"]}"#;
    host.able_launcher("firecracker", mmio, able);
    host.able_launcher("builtin", "[]", able);
    host.configure("enable_hugepages = true\nblock_device_driver = \"virtio-mmio\"");
    assert_eq!(
        host.resolve().await.unwrap_err(),
        [
            "DIR/etc/configuration.toml:4:1: hypervisor.qemu.enable_hugepages: found true, but qemu 9.1 has no huge \
             pages; set it to false, or use a hypervisor that can: firecracker, builtin",
            "DIR/etc/configuration.toml:5:1: hypervisor.qemu.block_device_driver: found \"virtio-mmio\" (a string), \
             expected one of \"virtio-blk\", \"virtio-blk-pci\", or use a hypervisor that can: firecracker",
        ]
    );
}

/// One resolver: what it remembers of one machine does not hold for the other.
#[tokio::test]
async fn what_can_be_done_is_asked_with_the_options_that_are_written() {
    let host = Host::new();
    host.program(
        "bin/caisson-vmm-qemu",
        r#"if [ $1 = options ]; then echo '[{"key": "machine_type", "type": "string", "default": "microvm"}]'; exit; fi
case $6 in *q35*) can='"resize-vcpus"';; *) why='"resize-vcpus": "microvm is as it is"';; esac
echo "{\"version\": \"1\", \"devices\": [\"fs\"], \"operations\": [$can], \"missing\": {$why}}""#,
    );
    let more = "default_maxvcpus = 4\n";
    let microvm = host.configure_as("etc/microvm.toml", more);
    let q35 = host.configure_as("etc/q35.toml", &format!("{more}machine_type = \"q35\""));
    let mut resolver = Resolver::new(host.installation());
    let refused = resolver.resolve(Some(&microvm)).await.map(drop).unwrap_err();
    let told = "DIR/etc/microvm.toml:4:1: hypervisor.qemu.default_maxvcpus: found 4, but qemu 1 has no vCPU hotplug \
                (microvm is as it is); set it to 0";
    assert_eq!(host.sentences(&refused), [told]);
    assert_eq!(resolver.resolve(Some(&q35)).await.unwrap().config.vm.max_vcpus, 4);
}

beyond!(a_host_without_kvm_is_not_for_every_hypervisor:
    r#"{"devices": ["fs"], "accelerator": "", "accelerator_reason": "there is no /dev/kvm"}"#, "" =>
    "DIR/etc/configuration.toml:1:13: hypervisor.qemu: cannot run here: there is no /dev/kvm");

beyond!(a_launcher_that_does_not_know_what_it_can_do_is_reported:
    "everything", "" =>
    "DIR/etc/configuration.toml:1:13: hypervisor.qemu: ask DIR/bin/caisson-vmm-qemu what it can do: the answer is not what was asked for: expected value at line 1 column 1");

#[tokio::test]
async fn a_hypervisor_that_cannot_run_here_says_why() {
    let host = Host::new();
    host.configure("");
    host.program("bin/caisson-vmm-qemu", r#"[ $1 = options ] && echo '[]' && exit
printf "caisson-vmm-qemu: /usr/bin/qemu-system-x86_64 (pid 7) exited with status 1: it said:\n  it's without /dev/kvm\n" >&2
exit 1"#);
    assert_eq!(
        host.resolve().await.unwrap_err(),
        ["DIR/etc/configuration.toml:1:13: hypervisor.qemu: ask DIR/bin/caisson-vmm-qemu what it can do: \
          exit status: 1: \"caisson-vmm-qemu: /usr/bin/qemu-system-x86_64 (pid 7) exited with status 1: it said:; \
          it's without /dev/kvm\""]
    );
}

#[tokio::test]
async fn what_switches_sharing_off_leaves_nothing_to_say_about_it() {
    let host = Host::new();
    host.write(
        "etc/configuration.toml",
        "[hypervisor.qemu]\nkernel = \"DIR/kernel\"\nshared_fs = \"none\"\nvirtio_fs_cache = \"always\"",
    );
    assert_eq!(
        host.resolve().await.unwrap_err(),
        ["DIR/etc/configuration.toml:4:1: hypervisor.qemu.virtio_fs_cache: has no effect, since \
          hypervisor.qemu.shared_fs is \"none\" at DIR/etc/configuration.toml:3:1"]
    );
}

#[tokio::test]
async fn a_way_that_is_switched_off_contradicts_itself() {
    let host = Host::new();
    host.write(
        "etc/configuration.toml",
        "[hypervisor.qemu]\nkernel = \"DIR/kernel\"\nrootfs = \"virtio-fs\"\nshared_fs = \"none\"",
    );
    assert_eq!(
        host.resolve().await.unwrap_err(),
        ["DIR/etc/configuration.toml:3:1: hypervisor.qemu.rootfs: found \"virtio-fs\", but hypervisor.qemu.shared_fs \
          is \"none\" at DIR/etc/configuration.toml:4:1; set it to \"block\""]
    );
}

#[tokio::test]
async fn no_kernel_is_no_virtual_machine() {
    let host = Host::new();
    host.write("etc/configuration.toml", "[hypervisor.qemu]\nkernel = \"\"");
    assert_eq!(
        host.resolve().await.unwrap_err(),
        ["DIR/etc/configuration.toml:2:1: hypervisor.qemu.kernel: found \"\", expected the absolute path of a file"]
    );
}

#[tokio::test]
async fn a_virtiofsd_that_is_nowhere_is_told_with_where_it_was_looked_for() {
    let host = Host::new();
    host.write("etc/configuration.toml", "[hypervisor.qemu]\nkernel = \"DIR/kernel\"");
    std::fs::remove_file(host.path("bin/virtiofsd")).unwrap();
    assert_eq!(
        host.resolve().await.unwrap_err(),
        ["hypervisor.qemu.virtio_fs_daemon: there is no virtiofsd in DIR/bin; install it, or set this to where it is"]
    );
}

#[tokio::test]
async fn without_shared_directories_no_virtiofsd_is_looked_for() {
    let host = Host::new();
    host.write("etc/configuration.toml", "[hypervisor.qemu]\nkernel = \"DIR/kernel\"\nshared_fs = \"none\"");
    std::fs::remove_file(host.path("bin/virtiofsd")).unwrap();
    host.able_launcher("qemu", "[]", r#"{"version": "1", "devices": ["block"]}"#);
    assert!(host.resolve().await.unwrap().config.shared_fs.is_none());
}

#[tokio::test]
async fn a_relative_request_is_refused() {
    let host = Host::new();
    let told = host.resolve_file(Some(std::path::Path::new("configuration.toml"))).await.unwrap_err();
    assert_eq!(told, ["read configuration.toml: not an absolute path"]);
}

#[tokio::test]
async fn one_hypervisor_under_two_names_is_refused() {
    let host = Host::new();
    host.write("etc/configuration.toml", "[hypervisor.clh]\n[hypervisor.cloud-hypervisor]");
    assert_eq!(
        host.resolve().await.unwrap_err(),
        ["DIR/etc/configuration.toml:1:13: hypervisor.clh: is another name of cloud-hypervisor, which stands at \
          DIR/etc/configuration.toml:2:13; join the two tables"]
    );
}

#[tokio::test]
async fn a_file_without_a_hypervisor_says_what_to_add() {
    let host = Host::new();
    host.write("etc/configuration.toml", "");
    assert_eq!(host.resolve().await.unwrap_err(), ["no hypervisor is chosen; add a table [hypervisor.qemu]"]);
}

#[tokio::test]
async fn bytes_that_are_no_text_are_located() {
    let host = Host::new();
    std::fs::write(host.path("etc/configuration.toml"), b"# \xc3\xa4\n# \xff").unwrap();
    assert_eq!(host.resolve().await.unwrap_err(), ["DIR/etc/configuration.toml:2:3: not UTF-8"]);
}

#[tokio::test]
async fn a_launcher_that_fails_is_quoted() {
    let host = Host::new();
    host.configure("");
    host.program("bin/caisson-vmm-qemu", "echo 'no such subcommand' >&2; exit 2");
    assert_eq!(
        host.resolve().await.unwrap_err(),
        ["DIR/etc/configuration.toml:1:13: hypervisor.qemu: ask DIR/bin/caisson-vmm-qemu for its options: \
          exit status: 2: \"no such subcommand\""]
    );
}

#[tokio::test]
async fn a_launcher_that_talks_nonsense_is_reported() {
    let host = Host::new();
    host.configure("");
    host.launcher("qemu", "hello");
    let told = host.resolve().await.unwrap_err();
    assert_eq!(told.len(), 1);
    assert!(told[0].contains("the answer is not what was asked for: expected value at line 1 column 1"), "{told:?}");
}

#[tokio::test]
async fn a_configuration_that_is_a_directory_is_refused() {
    let host = Host::new();
    let told = host.resolve_file(Some(&host.path("etc"))).await.unwrap_err();
    assert_eq!(told, ["read DIR/etc: not a file"]);
}

#[tokio::test]
async fn a_requested_file_that_does_not_exist_is_no_reason_to_take_another() {
    let host = Host::new();
    host.configure("");
    let told = host.resolve_file(Some(&host.path("other.toml"))).await.unwrap_err();
    assert_eq!(told, ["read DIR/other.toml: No such file or directory (os error 2)"]);
}
