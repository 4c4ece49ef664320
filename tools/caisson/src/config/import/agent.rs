//! `[agent.kata]`.

use super::{
    convert,
    rule::{Rule, nothing, runtime, same},
};

const CONFIDENTIAL: &str = "caisson's guest has no confidential data hub";
const DIALS: &str = "caisson's agent dials the host when it is ready: nobody retries";
const MEM_AGENT: &str = "caisson's agent does not reclaim memory by itself";
const PORT: &str = "caisson chooses the ports";
const TRACING: &str = "caisson exports no traces; its log tells the time of each step of a start";

pub(super) const AGENT: &[Rule] = &[
    runtime("enable_debug", "log_level", convert::debug),
    runtime("log_level", "log_level", convert::log_level),
    same("debug_console_enabled", "caisson has no debug console"),
    runtime("dial_timeout", "boot_timeout_ms", convert::seconds),
    runtime("reconnect_timeout_ms", "boot_timeout_ms", convert::reconnect),
    runtime("create_container_timeout", "request_timeout_ms", convert::seconds),
    nothing("dial_timeout_ms", DIALS),
    nothing("health_check_request_timeout_ms", "the end of a guest is seen at once, without asking it"),
    nothing("server_port", PORT),
    nothing("log_port", PORT),
    nothing("passfd_listener_port", PORT),
    nothing("kernel_modules", "the guest loads what it needs by itself; others belong into its initrd"),
    nothing("container_pipe_size", "a pipe has the guest kernel's size"),
    nothing("launch_process_timeout", "request_timeout_ms of [runtime] covers it"),
    nothing("cdh_api_timeout", CONFIDENTIAL),
    nothing("cdh_api_timeout_ms", CONFIDENTIAL),
    nothing("visible_cdi_devices", "caisson's guest does not read CDI files"),
    nothing("policy", "caisson's agent has no policy: it serves its own host alone"),
    nothing("enable_tracing", TRACING),
    nothing("trace_mode", TRACING),
    nothing("trace_type", TRACING),
];

/// `[agent.kata.mem_agent]`, key by key the same answer.
pub(super) fn is_mem_agent(section: &str) -> Option<&'static str> {
    section.ends_with(".mem_agent").then_some(MEM_AGENT)
}
