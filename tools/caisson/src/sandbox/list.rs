//! `caisson sandbox list`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use caisson_protocol::paths;

use super::found::{self, Record};
use crate::output::{Format, table};

pub(super) fn run(format: Format) -> anyhow::Result<()> {
    let records: Vec<_> = found::all(&paths::sandboxes_dir())?.into_iter().map(|sandbox| sandbox.record).collect();
    format.print(&records, |records| text(records, SystemTime::now()))
}

fn text(records: &[Record], now: SystemTime) -> String {
    let mut list = table(&["NAMESPACE", "SANDBOX", "HYPERVISOR", "AGE", "SHIM", "LAUNCHER", "VMM"]);
    for record in records {
        // A sandbox that only begins has no hypervisor and no processes but its shim.
        let hypervisor = if record.hypervisor.is_empty() { "-" } else { &record.hypervisor };
        let pids = [record.shim_pid, record.launcher_pid, record.vmm_pid];
        let [shim, launcher, vmm] = pids.map(|pid| if pid == 0 { "-".to_owned() } else { pid.to_string() });
        list.add_row([&record.namespace, &record.id, hypervisor, &age(record, now), &shim, &launcher, &vmm]);
    }
    list.trim_fmt()
}

/// In the largest unit of which there is at least one.
pub(super) fn age(record: &Record, now: SystemTime) -> String {
    let created = UNIX_EPOCH + Duration::from_millis(record.created_unix_ms);
    match now.duration_since(created).unwrap_or_default().as_secs() {
        seconds @ ..60 => format!("{seconds}s"),
        seconds @ ..3_600 => format!("{}m", seconds / 60),
        seconds @ ..86_400 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web() -> Record {
        let (namespace, hypervisor) = ("k8s.io".to_owned(), "qemu".to_owned());
        Record { namespace, id: "web".into(), hypervisor, shim_pid: 1, launcher_pid: 2, vmm_pid: 3, created_unix_ms: 0 }
    }

    #[test]
    fn the_table_names_every_column() {
        let text = text(&[web()], UNIX_EPOCH + Duration::from_secs(7200));
        let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["NAMESPACE", "SANDBOX", "HYPERVISOR", "AGE", "SHIM", "LAUNCHER", "VMM"]);
        assert_eq!(lines[1], ["k8s.io", "web", "qemu", "2h", "1", "2", "3"]);
    }

    #[test]
    fn a_clock_that_was_set_back_makes_nothing_negative() {
        let mut young = web();
        young.created_unix_ms = 10_000;
        assert_eq!(age(&young, UNIX_EPOCH), "0s");
    }
}
