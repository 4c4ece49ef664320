//! What the tests found of each hypervisor, as a table: `cargo xtask results`. The KVM tests leave it, and print it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use caisson_testbed::{Installation, TestResult, Verdict};
use comfy_table::{Table, presets};

/// Rows of the table, in order, with how the paths of their tests begin. The first that fits takes a test.
const OPERATIONS: &[(&str, &[&str])] = &[
    ("what it can do, asked of itself", &["capabilities::"]),
    ("boot, power off", &["life::a_guest_that_powers", "life::a_guest_has", "terminal::a_guest_in_a_pipe"]),
    ("reboot", &["life::a_guest_that_reboots"]),
    ("guest panic", &["life::a_panic", "terminal::a_guest_that_panics"]),
    ("pause, resume", &["life::a_paused"]),
    ("stop", &["life::stop"]),
    ("launcher or hypervisor killed", &["life::a_killed", "life::a_launcher", "life::a_hypervisor"]),
    ("killed launcher's successor goes on", &["adoption::"]),
    ("snapshot, restore", &["snapshot::a_", "snapshot::what"]),
    ("persistent memory", &["disks::a_file_is_memory", "disks::what_is_no_whole"]),
    ("disks", &["disks::"]),
    ("network card", &["cards::", "integrity::a_card"]),
    ("vsock", &["integrity::vsock"]),
    ("shared directory", &["integrity::a_share", "devices::a_guest_finds_what_the_vmm"]),
    ("all devices together", &["devices::a_guest_"]),
    ("disks that come and go", &["devices::a_disk"]),
    ("device of the host (VFIO)", &["vfio::"]),
    (
        "processors and memory that come and go",
        &["sizes::processors", "sizes::memory", "sizes::more", "sizes::microvm"],
    ),
    ("balloon", &["balloon::"]),
    ("huge pages, or their refusal", &["memory::memory_is"]),
    ("system call filter", &["life::a_forbidden"]),
    ("metrics", &["devices::what"]),
    (
        "bad requests refused",
        &[
            "refusals::",
            "devices::a_shared_directory_cannot",
            "life::a_pause_that_would_end",
            "memory::a_confidential",
            "snapshot::no_guest",
        ],
    ),
    ("`run` on a terminal", &["terminal::"]),
    ("`ctr run`, exec, kill", &["lifecycle::"]),
    ("`ctr run`: standard streams", &["streams::"]),
    ("`ctr run`: pod of three containers", &["pod::"]),
    ("`ctr run`: killed hypervisor, launcher, shim", &["crashes::"]),
    ("`ctr run`: what cannot start is named", &["errors::"]),
    ("`ctr run`: root file system on disks", &["block_rootfs::"]),
    ("`ctr run`: sizes and guest", &["guest::", "sizes::"]),
    ("pods as Kubernetes makes them", &["cri::"]),
    ("VMs and pods that come and go", &["cycles::"]),
];

/// Results by hypervisor and test; of a test that ran several times, in order.
#[derive(Debug, Default)]
pub struct Results(BTreeMap<String, BTreeMap<String, Vec<TestResult>>>);

impl Results {
    /// Where the last KVM tests left theirs.
    pub fn path(installation: &Installation) -> PathBuf {
        installation.programs.join("test-kvm").join("results.jsonl")
    }

    /// Those of the file `path`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("read {}: `cargo xtask test-kvm` leaves it", path.display()))?;
        Ok(Self::parse(&text))
    }

    /// Of lines that are results; others are passed over.
    pub fn parse(text: &str) -> Self {
        let mut results = Self::default();
        for result in text.lines().filter_map(|line| serde_json::from_str::<TestResult>(line).ok()) {
            let tests = results.0.entry(result.hypervisor.clone()).or_default();
            tests.entry(result.test.clone()).or_default().push(result);
        }
        results
    }

    /// As Markdown: what works, by operation and hypervisor; and one line for each hypervisor that did not run.
    pub fn to_markdown(&self, missing: &[(String, String)]) -> String {
        let took_part =
            |(_, tests): &(&String, &BTreeMap<String, Vec<TestResult>>)| tests.values().any(|runs| ran(runs));
        let ran: Vec<&String> = self.0.iter().filter(took_part).map(|(name, _)| name).collect();
        let mut table = Table::new();
        let header = ran.iter().map(|name| format!("{name} {}", self.version(name)).trim_end().to_owned());
        table.load_preset(presets::ASCII_MARKDOWN).set_header(["operation".to_owned()].into_iter().chain(header));
        for (operation, _) in OPERATIONS {
            let cells: Vec<String> = ran.iter().map(|name| self.cell(name, operation)).collect();
            if cells.iter().any(|cell| cell != NONE) {
                table.add_row([(*operation).to_owned()].into_iter().chain(cells));
            }
        }
        let mut text = if ran.is_empty() { String::new() } else { format!("{table}\n") };
        for (name, why) in missing {
            text.push_str(&format!("\n{name}: not run: {why}\n"));
        }
        text
    }

    /// One line for each hypervisor: how many tests passed, and which did not.
    pub fn summary(&self) -> Vec<String> {
        self.0.iter().filter_map(|(name, tests)| self.line(name, tests)).collect()
    }

    fn line(&self, hypervisor: &str, tests: &BTreeMap<String, Vec<TestResult>>) -> Option<String> {
        let (passed, failed): (Vec<_>, Vec<_>) =
            tests.iter().filter(|(_, runs)| ran(runs)).partition(|(_, runs)| passed(runs));
        if passed.is_empty() && failed.is_empty() {
            return None;
        }
        let failed: Vec<&str> = failed.iter().map(|(test, _)| test.as_str()).collect();
        let which = if failed.is_empty() { String::new() } else { format!(", failed: {}", failed.join(", ")) };
        Some(format!("{hypervisor} {}: {} passed{which}", self.version(hypervisor), passed.len()))
    }

    fn version(&self, hypervisor: &str) -> String {
        let versions: BTreeSet<&str> =
            self.0[hypervisor].values().flatten().map(|result| result.version.as_str()).collect();
        versions.into_iter().filter(|version| !version.is_empty()).collect::<Vec<_>>().join(", ")
    }

    fn cell(&self, hypervisor: &str, operation: &str) -> String {
        let tests = self.0[hypervisor].iter().filter(|(test, runs)| operation_of(test) == Some(operation) && ran(runs));
        let (passed, failed): (Vec<_>, Vec<_>) = tests.partition(|(_, runs)| passed(runs));
        match (passed.len(), failed.len()) {
            (0, 0) => NONE.to_owned(),
            (count, 0) => format!("{count} passed"),
            (count, failed) => format!("**{failed} of {} failed**", count + failed),
        }
    }
}

/// No test of this operation ran.
const NONE: &str = "–";

fn operation_of(test: &str) -> Option<&'static str> {
    let fits = |starts: &[&str]| starts.iter().any(|start| test.starts_with(start));
    OPERATIONS.iter().find(|(_, starts)| fits(starts)).map(|(operation, _)| *operation)
}

/// Whether a test did not say, at last, that it cannot.
fn ran(runs: &[TestResult]) -> bool {
    runs.last().is_some_and(|run| !matches!(run.verdict, Verdict::NotRun(_)))
}

/// The last try counts, as for the test runner.
fn passed(runs: &[TestResult]) -> bool {
    runs.last().is_some_and(|run| run.verdict == Verdict::Passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(hypervisor: &str, test: &str, verdict: &str) -> String {
        format!(r#"{{"hypervisor":"{hypervisor}","version":"1.2","test":"{test}","verdict":{verdict}}}"#)
    }

    #[test]
    fn a_test_that_passed_at_last_has_passed() {
        let test = "snapshot::a_restored_guest";
        let lines =
            [r#""begun""#, r#""failed""#, r#""begun""#, r#""passed""#].map(|verdict| line("qemu", test, verdict));
        assert_eq!(Results::parse(&lines.join("\n")).summary(), ["qemu 1.2: 1 passed"]);
    }

    #[test]
    fn a_test_that_only_began_has_failed() {
        let results = Results::parse(&line("qemu", "pod::a", r#""begun""#));
        assert_eq!(results.summary(), ["qemu 1.2: 0 passed, failed: pod::a"]);
        assert!(results.to_markdown(&[]).contains("**1 of 1 failed**"));
    }

    #[test]
    fn a_test_that_began_and_could_not_run_is_not_counted() {
        let lines = [r#""begun""#, r#"{"not-run":"no IOMMU"}"#].map(|verdict| line("qemu", "vfio::a", verdict));
        assert!(Results::parse(&lines.join("\n")).summary().is_empty());
    }

    #[test]
    fn a_hypervisor_without_a_program_has_a_reason_instead_of_a_column() {
        let results = Results::parse(&line("acrn", "pod::a", r#"{"not-run":"no program"}"#));
        let table = results.to_markdown(&[("acrn".into(), "no program".into())]);
        assert_eq!(table, "\nacrn: not run: no program\n");
    }

    #[test]
    fn an_operation_that_one_hypervisor_lacks_is_a_dash() {
        let lines = [line("a", "pod::x", r#""passed""#), line("b", "snapshot::a_guest", r#""passed""#)];
        let table = Results::parse(&lines.join("\n")).to_markdown(&[]);
        assert!(table.contains("| snapshot, restore                  | –        | 1 passed |"), "{table}");
    }
}
