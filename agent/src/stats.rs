//! What a container uses, in containerd's message for cgroup v2.

use caisson_protocol::containerd::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};

use crate::{
    cgroup::{Cgroup, field},
    error::{Error, Result},
};

/// containerd finds the message by this name.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The numbers of `cgroup`. A controller that the kernel lacks counts nothing.
///
/// # Errors
/// When the message cannot be written.
pub fn of(cgroup: &Cgroup) -> Result<Any> {
    let value = metrics(cgroup)
        .write_to_bytes()
        .map_err(|error| Error::Invalid(format!("write the numbers of {}: {error}", cgroup.path().display())))?;
    Ok(Any { type_url: TYPE_URL.into(), value, ..Default::default() })
}

fn metrics(cgroup: &Cgroup) -> Metrics {
    let read = |file: &str| cgroup.read(file).unwrap_or_default();
    let single = |file: &str| limit(read(file).trim());
    Metrics {
        pids: MessageField::some(PidsStat {
            current: single("pids.current"),
            limit: single("pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(&read("cpu.stat"))),
        memory: MessageField::some(MemoryStat {
            usage: single("memory.current"),
            usage_limit: single("memory.max"),
            swap_usage: single("memory.swap.current"),
            swap_limit: single("memory.swap.max"),
            max_usage: single("memory.peak"),
            ..memory(&read("memory.stat"))
        }),
        memory_events: MessageField::some(memory_events(&read("memory.events"))),
        io: MessageField::some(io(&read("io.stat"))),
        ..Default::default()
    }
}

fn cpu(text: &str) -> CPUStat {
    let number = |key: &str| number(text, key);
    CPUStat {
        usage_usec: number("usage_usec"),
        user_usec: number("user_usec"),
        system_usec: number("system_usec"),
        nr_periods: number("nr_periods"),
        nr_throttled: number("nr_throttled"),
        throttled_usec: number("throttled_usec"),
        ..Default::default()
    }
}

fn memory(text: &str) -> MemoryStat {
    let number = |key: &str| number(text, key);
    MemoryStat {
        anon: number("anon"),
        file: number("file"),
        kernel_stack: number("kernel_stack"),
        slab: number("slab"),
        sock: number("sock"),
        shmem: number("shmem"),
        file_mapped: number("file_mapped"),
        file_dirty: number("file_dirty"),
        file_writeback: number("file_writeback"),
        anon_thp: number("anon_thp"),
        inactive_anon: number("inactive_anon"),
        active_anon: number("active_anon"),
        inactive_file: number("inactive_file"),
        active_file: number("active_file"),
        unevictable: number("unevictable"),
        slab_reclaimable: number("slab_reclaimable"),
        slab_unreclaimable: number("slab_unreclaimable"),
        pgfault: number("pgfault"),
        pgmajfault: number("pgmajfault"),
        pgrefill: number("pgrefill"),
        pgscan: number("pgscan"),
        pgsteal: number("pgsteal"),
        pgactivate: number("pgactivate"),
        pgdeactivate: number("pgdeactivate"),
        pglazyfree: number("pglazyfree"),
        pglazyfreed: number("pglazyfreed"),
        thp_fault_alloc: number("thp_fault_alloc"),
        thp_collapse_alloc: number("thp_collapse_alloc"),
        ..Default::default()
    }
}

fn memory_events(text: &str) -> MemoryEvents {
    let number = |key: &str| number(text, key);
    MemoryEvents {
        low: number("low"),
        high: number("high"),
        max: number("max"),
        oom: number("oom"),
        oom_kill: number("oom_kill"),
        ..Default::default()
    }
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`, one line a disk.
fn io(text: &str) -> IOStat {
    let usage = text.lines().filter_map(|line| {
        let (device, counters) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let counter = |key: &str| {
            let mut pairs = counters.split(' ').filter_map(|pair| pair.split_once('='));
            pairs.find(|(name, _)| *name == key).and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
        };
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: counter("rbytes"),
            wbytes: counter("wbytes"),
            rios: counter("rios"),
            wios: counter("wios"),
            ..Default::default()
        })
    });
    IOStat { usage: usage.collect(), ..Default::default() }
}

fn number(text: &str, key: &str) -> u64 {
    field(text, key).and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// A limit that is not set counts as the largest number, as containerd expects.
fn limit(text: &str) -> u64 {
    if text == "max" { u64::MAX } else { text.parse().unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_of_each_disk_are_read() {
        let io = io("254:0 rbytes=90 wbytes=4 rios=7 wios=1 dbytes=0 dios=0\n");
        let entry = &io.usage[0];
        assert_eq!((entry.major, entry.minor, entry.rbytes, entry.wios), (254, 0, 90, 1));
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!((limit("max"), limit("4096"), limit("")), (u64::MAX, 4096, 0));
    }
}
