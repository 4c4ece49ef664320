//! What Firecracker counts. It writes a line of JSON to a pipe whenever it is told to, and each line has what was added
//! since the one before.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use caisson_vmm_launcher::{
    Error, Result,
    metrics::{BLOCK_READ, BLOCK_WRITTEN, Family, Metrics, NET_RECEIVED, NET_SENT},
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    sync::watch,
    task::AbortHandle,
    time::timeout,
};

use crate::{api::Api, layout::open_pipe};

/// Firecracker writes before it answers, unless the pipe is full.
const DEADLINE: Duration = Duration::from_secs(5);
/// A line has about 20 KiB, and some more for each device.
const MAX_LINE: u64 = 1 << 20;

const EXITS: Family = Family { name: "caisson_vm_exits_total", help: "Times that the guest needed Firecracker." };
const EXIT_KINDS: [&str; 4] = ["exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write"];
/// Group of Firecracker's, key in it, and our name for it.
const BY_DEVICE: [(&str, &str, Family); 4] = [
    ("block_", "read_bytes", BLOCK_READ),
    ("block_", "write_bytes", BLOCK_WRITTEN),
    ("net_", "rx_bytes_count", NET_RECEIVED),
    ("net_", "tx_bytes_count", NET_SENT),
];

/// More than a guest has places for devices, each with its counters.
const MAX_SUMS: usize = 256;

/// Sums of what was told and is of interest.
#[derive(Debug, Default)]
struct Sums(BTreeMap<(String, String), u64>);

impl Sums {
    fn add(&mut self, line: &Value) {
        let groups = line.as_object().into_iter().flatten();
        for (group, counters) in groups {
            for (key, count) in counters.as_object().into_iter().flatten().filter(|(key, _)| is_known(group, key)) {
                let sum = (group.clone(), key.clone());
                if let Some(count) = count.as_u64()
                    && (self.0.len() < MAX_SUMS || self.0.contains_key(&sum))
                {
                    let sum = self.0.entry(sum).or_default();
                    *sum = sum.saturating_add(count);
                }
            }
        }
    }

    fn text(&self) -> String {
        let mut metrics = Metrics::default();
        let exits = EXIT_KINDS.iter().filter_map(|kind| {
            let count = self.0.get(&("vcpu".to_owned(), (*kind).to_owned()))?;
            Some((kind.trim_start_matches("exit_"), *count))
        });
        metrics.by_label(EXITS, "kind", exits);
        for (prefix, key, family) in BY_DEVICE {
            let devices = self.0.iter().filter(|((_, counter), _)| counter == key);
            let devices = devices.filter_map(|((group, _), count)| Some((group.strip_prefix(prefix)?, *count)));
            metrics.by_label(family, "device", devices);
        }
        metrics.text()
    }
}

fn is_known(group: &str, key: &str) -> bool {
    group == "vcpu" && EXIT_KINDS.contains(&key)
        || BY_DEVICE.iter().any(|(prefix, counter, _)| group.starts_with(prefix) && key == *counter)
}

/// The counters of one Firecracker.
#[derive(Debug)]
pub struct Counters {
    sums: Arc<Mutex<Sums>>,
    told: watch::Receiver<()>,
    reader: AbortHandle,
}

impl Counters {
    /// Reads from the named pipe `path`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn read(path: &Path) -> Result<Self> {
        let pipe = open_pipe(path);
        let mut pipe = BufReader::new(pipe.map_err(Error::host(format!("open {}", path.display())))?);
        let sums = Arc::new(Mutex::new(Sums::default()));
        let (tell, told) = watch::channel(());
        let added = sums.clone();
        let reader = tokio::spawn(async move {
            let mut line = Vec::new();
            while let Ok(1..) = (&mut pipe).take(MAX_LINE).read_until(b'\n', &mut line).await {
                // What is no JSON is the end of a line that was too long.
                if let Ok(line) = serde_json::from_slice(&line) {
                    added.lock().expect("no reader panics").add(&line);
                    tell.send_replace(());
                }
                line.clear();
            }
        });
        Ok(Self { sums, told, reader: reader.abort_handle() })
    }

    /// All of them as they are now.
    ///
    /// # Errors
    /// When Firecracker does not tell.
    pub async fn text(&self, api: &Api) -> Result<String> {
        let mut told = self.told.clone();
        told.mark_unchanged();
        api.flush_metrics().await?;
        let told = timeout(DEADLINE, told.changed()).await;
        told.map_err(|_| Error::Hypervisor("Firecracker does not tell what it counts".into())).map(drop)?;
        Ok(self.sums.lock().expect("no reader panics").text())
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_told_is_added_up() {
        let mut sums = Sums::default();
        let line = json!({ "utc_timestamp_ms": 1, "vcpu": { "exit_io_in": 2 }, "block_root": { "read_bytes": 512 } });
        sums.add(&line);
        sums.add(&line);
        let text = sums.text();
        assert!(text.contains("\ncaisson_vm_exits_total{kind=\"io_in\"} 4\n"), "{text}");
        assert!(text.contains("\ncaisson_vm_block_read_bytes_total{device=\"root\"} 1024\n"), "{text}");
    }

    #[test]
    fn what_is_no_counter_is_passed_over() {
        let mut sums = Sums::default();
        sums.add(&json!({ "vcpu": { "exit_io_in": -1, "exit_io_in_agg": { "min_us": 3 } }, "odd": [1] }));
        sums.add(&json!(7));
        assert_eq!(sums.text(), "");
    }

    #[test]
    fn a_hypervisor_that_invents_counters_is_not_remembered_without_end() {
        let mut sums = Sums::default();
        let invented = |number: usize| (format!("block_{number}"), json!({ "read_bytes": 1, "odd": 1 }));
        sums.add(&(0..2 * MAX_SUMS).map(invented).collect());
        assert_eq!(sums.0.len(), MAX_SUMS);
        assert!(sums.0.keys().all(|(_, key)| key == "read_bytes"));
    }
}
