//! What the tests found of each hypervisor: one line of JSON per test, in the file that `$CAISSON_RESULTS` names. The
//! table of operations and hypervisors is made from it.

use std::{
    cell::RefCell,
    env,
    fs::OpenOptions,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use serde::{Deserialize, Serialize};

/// The file that lines are added to. Without it, nothing is recorded.
const VARIABLE: &str = "CAISSON_RESULTS";

/// One test with one hypervisor.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct TestResult {
    /// As in its launcher's name.
    pub hypervisor: String,
    /// As its program tells it; empty when there was none to ask.
    pub version: String,
    /// The test's path without the hypervisor: `life::a_guest_that_powers_off_ends_its_vm`.
    pub test: String,
    /// How it ended.
    pub verdict: Verdict,
}

/// How a test ended.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It began; when no other line follows, it hung or its process died.
    Begun,
    /// It passed.
    Passed,
    /// It failed.
    Failed,
    /// It could not run, with the reason.
    NotRun(String),
}

thread_local! {
    /// Why the test of this thread could not run after all.
    static SKIPPED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The test of this thread has found that it cannot run: it says why and ends, and is not counted as passed.
pub fn skip(why: impl Into<String>) {
    let why = why.into();
    eprintln!("not run: {why}");
    SKIPPED.set(Some(why));
}

/// Tells how the test of this thread ends. A test that ends otherwise than by [`Self::pass`] has failed.
#[derive(Debug)]
pub struct Recording {
    result: TestResult,
    passed: bool,
}

impl Recording {
    /// Begins; `program` is the hypervisor's, which is asked for its version.
    pub fn begin(hypervisor: &str, program: Option<&Path>) -> Self {
        let version = match (program, env::var_os(VARIABLE)) {
            (Some(program), Some(_)) => version_of(program).unwrap_or_default(),
            (None, Some(_)) => env!("CARGO_PKG_VERSION").to_owned(),
            (_, None) => String::new(),
        };
        let recording = Self { result: result(hypervisor, version, Verdict::Begun), passed: false };
        recording.result.write();
        recording
    }

    /// The test has shown what it is to show.
    pub fn pass(&mut self) {
        self.passed = true;
    }

    /// The test of this thread cannot run.
    pub fn not_run(hypervisor: &str, why: &str) {
        result(hypervisor, String::new(), Verdict::NotRun(why.to_owned())).write();
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let passed = self.passed && !thread::panicking();
        self.result.verdict = match SKIPPED.take() {
            Some(why) if !thread::panicking() => Verdict::NotRun(why),
            _ if passed => Verdict::Passed,
            _ => Verdict::Failed,
        };
        self.result.write();
    }
}

impl TestResult {
    /// Tests run beside each other: a line is one write.
    fn write(&self) {
        let Some(path) = env::var_os(VARIABLE) else { return };
        let written = OpenOptions::new().create(true).append(true).open(&path).and_then(|mut file| {
            let mut line = serde_json::to_string(self)?;
            line.push('\n');
            file.write_all(line.as_bytes())
        });
        if let Err(error) = written {
            eprintln!("cannot record the test's end in {}: {error}", path.display());
        }
    }
}

fn result(hypervisor: &str, version: String, verdict: Verdict) -> TestResult {
    let thread = thread::current();
    let test = thread.name().unwrap_or_default();
    TestResult { hypervisor: hypervisor.to_owned(), version, test: without_backend(test), verdict }
}

/// `life::qemu::a_guest` and `pod::a_guest` alike: the first and the last part.
fn without_backend(path: &str) -> String {
    match (path.split_once("::"), path.rsplit_once("::")) {
        (Some((module, _)), Some((_, test))) => format!("{module}::{test}"),
        _ => path.to_owned(),
    }
}

/// The version in the first line that the hypervisor `program` prints of itself: its first word that begins with a digit.
pub fn version_of(program: &Path) -> Option<String> {
    ["--version", "-version"].iter().find_map(|flag| {
        let output = Command::new(program).arg(flag).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        version_in(&String::from_utf8_lossy(&output.stdout))
    })
}

fn version_in(text: &str) -> Option<String> {
    let words = text.lines().next()?.split_whitespace().map(|word| word.trim_start_matches('v'));
    words.into_iter().find(|word| word.starts_with(|letter: char| letter.is_ascii_digit())).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_as_each_hypervisor_tells_them() {
        assert_eq!(version_in("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright").as_deref(), Some("7.2.22"));
        assert_eq!(version_in("cloud-hypervisor v53.0.0").as_deref(), Some("53.0.0"));
        assert_eq!(version_in("Firecracker v1.17.0-dev\n").as_deref(), Some("1.17.0-dev"));
        assert_eq!(version_in("StratoVirt 2.5.0").as_deref(), Some("2.5.0"));
        assert_eq!(version_in(""), None);
    }

    #[test]
    fn a_test_is_the_same_for_each_hypervisor() {
        assert_eq!(without_backend("life::qemu::a_guest_ends"), "life::a_guest_ends");
        assert_eq!(without_backend("pod::containers_share"), "pod::containers_share");
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let line = serde_json::to_string(&result("qemu", "7.2".into(), Verdict::NotRun("no KVM".into()))).unwrap();
        assert!(line.ends_with(r#""verdict":{"not-run":"no KVM"}}"#), "{line}");
        assert_eq!(serde_json::from_str::<TestResult>(&line).unwrap().hypervisor, "qemu");
    }
}
