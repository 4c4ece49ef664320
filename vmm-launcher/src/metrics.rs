//! Prometheus' text format, and the names of what several hypervisors count.

use std::fmt::Write;

use crate::size::Size;

/// A name with its meaning.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// `caisson_vm_…`; a counter's ends in `_total`.
    pub name: &'static str,
    /// One sentence.
    pub help: &'static str,
}

/// The guest's memory.
const MEMORY: Family = Family { name: "caisson_vm_memory_bytes", help: "The guest's memory." };
/// The guest's processors.
const VCPUS: Family = Family { name: "caisson_vm_vcpus", help: "The guest's processors." };
/// By `device`.
pub const BLOCK_READ: Family =
    Family { name: "caisson_vm_block_read_bytes_total", help: "Bytes that the guest read from a disk." };
/// By `device`.
pub const BLOCK_WRITTEN: Family =
    Family { name: "caisson_vm_block_written_bytes_total", help: "Bytes that the guest wrote to a disk." };
/// By `device`.
pub const NET_RECEIVED: Family =
    Family { name: "caisson_vm_net_received_bytes_total", help: "Bytes that the guest received from a network." };
/// By `device`.
pub const NET_SENT: Family =
    Family { name: "caisson_vm_net_sent_bytes_total", help: "Bytes that the guest sent to a network." };

/// Text that grows by one family at a time.
#[derive(Debug, Default)]
pub struct Metrics(String);

impl Metrics {
    /// How big the VM is.
    pub fn size(&mut self, size: Size) {
        self.number(MEMORY, size.memory_mib << 20);
        self.number(VCPUS, size.vcpus.into());
    }

    /// One number without labels.
    pub fn number(&mut self, family: Family, value: u64) {
        self.head(family);
        let _ = writeln!(self.0, "{} {value}", family.name);
    }

    /// A number for each value of `label`; nothing when there are none. Values are device ids and the like.
    pub fn by_label<'a>(&mut self, family: Family, label: &str, values: impl IntoIterator<Item = (&'a str, u64)>) {
        let mut values = values.into_iter().peekable();
        if values.peek().is_some() {
            self.head(family);
        }
        for (labelled, value) in values {
            let _ = writeln!(self.0, "{}{{{label}=\"{}\"}} {value}", family.name, labelled.escape_default());
        }
    }

    /// As Prometheus reads it.
    pub fn text(self) -> String {
        self.0
    }

    fn head(&mut self, Family { name, help }: Family) {
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_has_one_head() {
        let mut metrics = Metrics::default();
        metrics.by_label(NET_SENT, "device", [("net0", 1), ("net1", 2)]);
        assert_eq!(
            metrics.text(),
            "# HELP caisson_vm_net_sent_bytes_total Bytes that the guest sent to a network.\n\
             # TYPE caisson_vm_net_sent_bytes_total counter\n\
             caisson_vm_net_sent_bytes_total{device=\"net0\"} 1\n\
             caisson_vm_net_sent_bytes_total{device=\"net1\"} 2\n"
        );
    }

    #[test]
    fn a_family_without_values_is_not_mentioned() {
        let mut metrics = Metrics::default();
        metrics.by_label(BLOCK_READ, "device", []);
        assert_eq!(metrics.text(), "");
    }

    #[test]
    fn what_is_no_counter_is_a_gauge() {
        let mut metrics = Metrics::default();
        metrics.number(VCPUS, 2);
        assert!(metrics.text().contains("# TYPE caisson_vm_vcpus gauge\ncaisson_vm_vcpus 2\n"));
    }
}
