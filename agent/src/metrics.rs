//! The guest's numbers as Prometheus text.

use std::{fmt::Write, fs};

use crate::{
    cgroup::{Cgroup, field},
    containers::Containers,
    machine,
};

/// Everything, at this moment.
pub fn text(containers: &Containers) -> String {
    let mut text = String::new();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0.0);
    gauge(&mut text, "caisson_agent_resident_bytes", "Memory of the agent.", bytes(&status, "VmRSS:"));
    gauge(&mut text, "caisson_guest_memory_bytes", "Memory of the guest.", bytes(&memory, "MemTotal:"));
    gauge(
        &mut text,
        "caisson_guest_memory_available_bytes",
        "Memory for new programs.",
        bytes(&memory, "MemAvailable:"),
    );
    gauge(&mut text, "caisson_guest_vcpus", "Processors in use.", f64::from(machine::vcpus()));
    gauge(&mut text, "caisson_guest_load1", "Load, one-minute average.", load);

    let all = containers.all();
    let each = [
        ("caisson_container_memory_bytes", "gauge", "Memory of a container.", memory_of as fn(&Cgroup) -> f64),
        ("caisson_container_processes", "gauge", "Processes of a container.", processes_of),
        ("caisson_container_cpu_seconds_total", "counter", "Processor time of a container.", cpu_of),
    ];
    for (name, kind, help, number) in each {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for container in &all {
            let _ = writeln!(text, "{name}{{container=\"{}\"}} {}", container.id(), number(container.cgroup()));
        }
    }
    text
}

fn gauge(text: &mut String, name: &str, help: &str, value: f64) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
}

fn bytes(text: &str, key: &str) -> f64 {
    machine::kib(text, key) as f64 * 1024.0
}

fn memory_of(cgroup: &Cgroup) -> f64 {
    single(cgroup, "memory.current")
}

fn processes_of(cgroup: &Cgroup) -> f64 {
    single(cgroup, "pids.current")
}

fn cpu_of(cgroup: &Cgroup) -> f64 {
    let text = cgroup.read("cpu.stat").unwrap_or_default();
    field(&text, "usage_usec").and_then(|number| number.parse::<f64>().ok()).unwrap_or(0.0) / 1e6
}

fn single(cgroup: &Cgroup, file: &str) -> f64 {
    cgroup.read(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reaper::Reaper;

    #[test]
    fn a_guest_without_containers_still_tells_of_itself() {
        let text = text(&Containers::new(Reaper::default()));
        assert!(text.contains("\ncaisson_guest_vcpus "), "{text}");
        assert!(text.contains("# TYPE caisson_container_cpu_seconds_total counter\n"), "{text}");
    }
}
