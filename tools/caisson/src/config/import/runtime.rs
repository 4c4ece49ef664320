//! `[runtime]`, and the sections of older releases.

use super::{
    convert,
    rule::{Becomes, Rule, nothing, runtime},
};

const STATIC: &str = "caisson sizes every sandbox at its start: default_memory and default_vcpus, and its limits";
const STREAMS: &str = "the kernel always moves the streams, on connections of their own";
const TRACING: &str = "caisson exports no traces; its log tells the time of each step of a start";
const CGROUP: &str = "caisson has one way of accounting";

pub(super) const RUNTIME: &[Rule] = &[
    runtime("enable_debug", "log_level", convert::debug),
    runtime("log_level", "log_level", convert::log_level),
    runtime("create_container_timeout", "request_timeout_ms", convert::seconds),
    nothing("name", "caisson has one runtime"),
    nothing("hypervisor_name", "the table [hypervisor.<name>] chooses it"),
    nothing("agent_name", "caisson has one agent"),
    nothing("internetworking_model", "caisson chooses how a pod's interfaces reach the guest"),
    nothing("disable_new_netns", "a pod's network namespace is containerd's choice"),
    nothing("sandbox_cgroup_only", CGROUP),
    nothing("enable_vcpus_pinning", "caisson does not pin vCPUs"),
    Rule { key: "static_sandbox_resource_mgmt", becomes: Becomes::NothingEvenOff, otherwise: STATIC },
    nothing("disable_guest_seccomp", "a container's seccomp profile is always in force in the guest"),
    nothing("guest_selinux_label", "caisson's guest has no SELinux"),
    nothing("sandbox_bind_mounts", "only a container's own mounts reach the guest"),
    nothing("shared_mounts", "only a container's own mounts reach the guest"),
    nothing("emptydir_mode", "an emptyDir is shared like every other volume"),
    nothing("disable_guest_empty_dir", "an emptyDir is shared like every other volume"),
    nothing("vfio_mode", "devices that are passed through belong to the guest's kernel"),
    nothing("experimental", "caisson has no experimental switches"),
    nothing("experimental_force_guest_pull", "images are always unpacked on the host"),
    nothing("enable_tracing", TRACING),
    nothing("jaeger_endpoint", TRACING),
    nothing("jaeger_user", TRACING),
    nothing("jaeger_password", TRACING),
    nothing("enable_pprof", "there is no profile of Go to be had of caisson"),
    nothing("dan_conf", "caisson takes a pod's network from its network namespace only"),
    nothing("keep_abnormal", "caisson always removes what a failed sandbox leaves"),
    nothing("use_passfd_io", STREAMS),
    nothing("passfd_listener_port", STREAMS),
    nothing("pod_resource_api_sock", "caisson does not ask the kubelet for devices"),
    nothing("kubelet_root_dir", "caisson tells volumes apart by the container's own configuration"),
];

/// Why nothing of a whole section can be carried over; none for sections that are read key by key.
pub(super) fn section_without_equivalent(section: &str) -> Option<&'static str> {
    Some(match section.split('.').next().unwrap_or_default() {
        "factory" => "caisson has no templates and no cache of virtual machines",
        "shim" => "containerd finds caisson's shim by its name",
        "proxy" => "caisson has no proxy: agent and shim speak over vsock",
        "netmon" => "caisson has no network monitor",
        "image" => "images are always unpacked on the host",
        _ => return None,
    })
}
