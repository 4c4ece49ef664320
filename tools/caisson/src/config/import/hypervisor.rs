//! `[hypervisor.<name>]`: its names, and its keys.

use super::{
    convert,
    rule::{Rule, nothing, runtime, same, same_with},
};

/// Our name for Kata's `name`; none when caisson has no such hypervisor.
pub(super) fn ours(name: &str) -> Option<&'static str> {
    crate::hypervisor::known::find(name).map(|known| known.name)
}

/// Why there is no such hypervisor here.
pub(super) fn why_not(name: &str) -> &'static str {
    match name {
        "remote" => "caisson's virtual machines are on the pod's own host, not in a cloud",
        "openvmm" => "caisson has no launcher for OpenVMM and its hosts",
        "virtframework" => "caisson runs on Linux",
        _ => "caisson has no launcher for it",
    }
}

const GUEST: &str = "it has Kata Containers' agent in it; caisson's own guest is used";
const KERNEL: &str = "it belongs to Kata Containers' guest; caisson's own kernel is used";
const VERITY: &str = "the command line of caisson's own guest says it";
const BLOCK: &str = "caisson chooses how disks are attached";
const NVDIMM: &str = "caisson's guest does not start from NVDIMM";
const MEMORY: &str = "caisson's guests have their memory as the hypervisor gives it";
const SWAP: &str = "caisson's guests have no swap";
const RATE: &str = "caisson does not limit the rates of disks and networks";
const SPDK: &str = "caisson has no vhost-user storage";
const VFIO: &str = "caisson does not pass devices through by configuration";
const IOMMU: &str = "caisson's guests have no IOMMU of their own";
const NUMA: &str = "caisson's guests have one memory node";
const OVERHEAD: &str = "default_memory and default_vcpus are what the guest itself gets; limits are added to them";
const CONFIDENTIAL: &str = "caisson has no confidential guests yet";
const ROOTLESS: &str = "caisson confines each hypervisor in its own way, which is always on";
const DUMP: &str = "caisson does not dump a guest's memory";
const TEMPLATE: &str = "caisson has no templates of virtual machines";
const REMOTE: &str = "caisson's virtual machines are on the pod's own host, not in a cloud";
const SELINUX: &str = "caisson sets no SELinux labels";
const CONTROL: &str = "caisson speaks to the hypervisor on a socket of its own";
const UNKNOWN_HERE: &str = "caisson has no such option for this hypervisor";

pub(super) const HYPERVISOR: &[Rule] = &[
    same("path", UNKNOWN_HERE),
    same("valid_hypervisor_paths", UNKNOWN_HERE),
    nothing("use_vsock", "agent and shim always speak over vsock"),
    nothing("ctlpath", CONTROL),
    nothing("valid_ctlpaths", CONTROL),
    same("jailer_path", ROOTLESS),
    same("valid_jailer_paths", ROOTLESS),
    nothing("kernel", KERNEL),
    nothing("image", GUEST),
    nothing("initrd", GUEST),
    nothing("rootfs_type", GUEST),
    nothing("vm_rootfs_driver", GUEST),
    nothing("guest_extension_images", GUEST),
    nothing("kernel_verity_params", VERITY),
    same_with("kernel_params", convert::kernel_params, UNKNOWN_HERE),
    same("firmware", "caisson starts the kernel without firmware"),
    same("firmware_volume", "caisson starts the kernel without firmware"),
    same("pflashes", "caisson starts the kernel without firmware"),
    same("machine_type", UNKNOWN_HERE),
    same("machine_accelerators", UNKNOWN_HERE),
    same("cpu_features", UNKNOWN_HERE),
    same("default_vcpus", UNKNOWN_HERE),
    same_with("default_maxvcpus", convert::limit, UNKNOWN_HERE),
    same("default_memory", UNKNOWN_HERE),
    same_with("default_maxmemory", convert::limit, UNKNOWN_HERE),
    nothing("overhead_vcpus", OVERHEAD),
    nothing("overhead_memory", OVERHEAD),
    same("memory_slots", "caisson gives a guest as many slots as it needs"),
    nothing("memory_offset", NVDIMM),
    nothing("disable_image_nvdimm", NVDIMM),
    same("enable_mem_prealloc", MEMORY),
    same("enable_hugepages", MEMORY),
    same("hugepage_type", MEMORY),
    same("enable_virtio_mem", MEMORY),
    same("reclaim_guest_freed_memory", MEMORY),
    nothing("file_mem_backend", MEMORY),
    nothing("valid_file_mem_backends", MEMORY),
    nothing("enable_guest_swap", SWAP),
    nothing("guest_swap_path", SWAP),
    nothing("guest_swap_size_percent", SWAP),
    nothing("guest_swap_create_threshold_secs", SWAP),
    nothing("enable_numa", NUMA),
    nothing("numa_mapping", NUMA),
    nothing("default_bridges", "caisson adds bridges where devices need them"),
    same("enable_iommu", IOMMU),
    same("enable_iommu_platform", IOMMU),
    nothing("cold_plug_vfio", VFIO),
    same("hot_plug_vfio", VFIO),
    same("hotplug_vfio_on_root_bus", VFIO),
    same("pcie_root_port", VFIO),
    same("pcie_switch_port", VFIO),
    nothing("disable_block_device_use", BLOCK),
    same_with("block_device_driver", convert::block_device_driver, BLOCK),
    same("block_device_aio", BLOCK),
    same("block_device_cache_set", BLOCK),
    same("block_device_cache_direct", BLOCK),
    same("block_device_cache_noflush", BLOCK),
    same("block_device_logical_sector_size", BLOCK),
    same("block_device_physical_sector_size", BLOCK),
    same("queue_size", BLOCK),
    same("num_queues", BLOCK),
    same("enable_iothreads", BLOCK),
    same("indep_iothreads", BLOCK),
    nothing("enable_vhost_user_store", SPDK),
    nothing("vhost_user_store_path", SPDK),
    nothing("valid_vhost_user_store_paths", SPDK),
    nothing("vhost_user_reconnect_timeout_sec", SPDK),
    nothing("disk_rate_limiter_bw_max_rate", RATE),
    nothing("disk_rate_limiter_bw_one_time_burst", RATE),
    nothing("disk_rate_limiter_ops_max_rate", RATE),
    nothing("disk_rate_limiter_ops_one_time_burst", RATE),
    nothing("net_rate_limiter_bw_max_rate", RATE),
    nothing("net_rate_limiter_bw_one_time_burst", RATE),
    nothing("net_rate_limiter_ops_max_rate", RATE),
    nothing("net_rate_limiter_ops_one_time_burst", RATE),
    nothing("rx_rate_limiter_max_rate", RATE),
    nothing("tx_rate_limiter_max_rate", RATE),
    same("disable_vhost_net", "with QEMU on KVM, caisson takes vhost-net where the host has it"),
    same("network_queues", "caisson gives an interface one pair of queues"),
    same_with("shared_fs", convert::shared_fs, UNKNOWN_HERE),
    same("virtio_fs_daemon", UNKNOWN_HERE),
    same("valid_virtio_fs_daemon_paths", UNKNOWN_HERE),
    same("virtio_fs_cache", UNKNOWN_HERE),
    same("virtio_fs_extra_args", UNKNOWN_HERE),
    same("virtio_fs_cache_size", "caisson's virtio-fs has no DAX window"),
    same("virtio_fs_is_dax", "caisson's virtio-fs has no DAX window"),
    same("virtio_fs_queue_size", "caisson's virtio-fs has the size of queue that virtiofsd likes best"),
    nothing("msize_9p", "caisson shares by virtio-fs, not 9p"),
    same("entropy_source", "the guest's entropy always comes from /dev/urandom"),
    same("valid_entropy_sources", "the guest's entropy always comes from /dev/urandom"),
    runtime("enable_debug", "log_level", convert::debug),
    runtime("log_level", "log_level", convert::log_level),
    nothing("hypervisor_loglevel", "log_level of [runtime] is for shim, launcher and agent alike"),
    nothing("extra_monitor_socket", CONTROL),
    nothing("guest_memory_dump_path", DUMP),
    nothing("guest_memory_dump_paging", DUMP),
    nothing("use_legacy_serial", "caisson's guests write to the serial console always"),
    nothing("disable_nesting_checks", "caisson finds out whether KVM really runs a guest"),
    nothing("disable_nested_virtualization", "cpu_features says it, where the hypervisor has that key"),
    nothing("disable_seccomp", ROOTLESS),
    // The Go runtime's name for it has no underscore.
    same("seccomp_sandbox", ROOTLESS),
    nothing("seccompsandbox", "seccomp_sandbox says it, whose default is as strict"),
    nothing("rootless", ROOTLESS),
    nothing("rootless_user", ROOTLESS),
    nothing("disable_selinux", SELINUX),
    nothing("disable_guest_selinux", SELINUX),
    nothing("selinux_label", SELINUX),
    nothing("confidential_guest", CONFIDENTIAL),
    same("sev_snp_guest", CONFIDENTIAL),
    nothing("snp_id_block", CONFIDENTIAL),
    nothing("snp_id_auth", CONFIDENTIAL),
    nothing("snp_guest_policy", CONFIDENTIAL),
    nothing("sev_guest_policy", CONFIDENTIAL),
    nothing("sev_cert_chain", CONFIDENTIAL),
    nothing("tdx_quote_generation_service_socket_port", CONFIDENTIAL),
    nothing("measurement_algo", CONFIDENTIAL),
    nothing("initdata", CONFIDENTIAL),
    nothing("guest_hook_path", "hooks of the container run in the guest; the guest's own image has none"),
    same_with("enable_annotations", convert::annotations, UNKNOWN_HERE),
    nothing("prefetch_list_path", "caisson has no nydus"),
    nothing("hypervisor_socket", REMOTE),
    nothing("hypervisor_timeout", REMOTE),
    nothing("remote_hypervisor_socket", REMOTE),
    nothing("remote_hypervisor_timeout", REMOTE),
    nothing("default_gpus", REMOTE),
    nothing("default_gpu_model", REMOTE),
    nothing("boot_to_be_template", TEMPLATE),
    nothing("boot_from_template", TEMPLATE),
    nothing("memory_path", TEMPLATE),
    nothing("device_state_path", TEMPLATE),
];

/// Why nothing of a table inside a hypervisor's can be carried over.
pub(super) fn inner_table_without_equivalent(name: &str) -> Option<&'static str> {
    Some(match name {
        "factory" => TEMPLATE,
        "rootless_user" => ROOTLESS,
        _ => return None,
    })
}
