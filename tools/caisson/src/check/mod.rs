//! `caisson check`: can this machine and this configuration run sandboxes, and does containerd know.

mod configuration;
mod containerd;
mod host;

use std::{path::PathBuf, process::ExitCode};

use caisson_config_service::{installation::Installation, resolve::Resolver};
use serde::Serialize;

use crate::{
    launcher::{self, Capabilities},
    output::{Format, table},
};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  caisson check
  caisson check --config /etc/caisson/configuration-fc.toml
  caisson check --strict && echo ready            also without warnings
  caisson check --json | jq -r '.[] | select(.verdict == \"fail\") | .remedy'

Ends with 0 when nothing failed, with 1 otherwise; --strict counts warnings too.")]
pub(crate) struct Arguments {
    /// The configuration to check; without it, the one that a sandbox would get.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Also end with 1 when there are warnings.
    #[arg(long)]
    strict: bool,
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    verdict: Verdict,
    /// What was looked at, in a word or two.
    subject: String,
    /// What was found.
    found: String,
    /// What to do about it; none when nothing needs doing.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Pass,
    /// Sandboxes run, but something is slower or cannot be used.
    Warn,
    /// Sandboxes do not run.
    Fail,
}

impl Finding {
    fn pass(subject: &str, found: impl Into<String>) -> Self {
        Self { verdict: Verdict::Pass, subject: subject.into(), found: found.into(), remedy: None }
    }

    fn warn(subject: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warn, subject: subject.into(), found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(subject: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, subject: subject.into(), found: found.into(), remedy: Some(remedy.into()) }
    }
}

pub(crate) async fn run(arguments: Arguments, format: Format) -> anyhow::Result<ExitCode> {
    let installation = Installation::of_this_program();
    let requested = arguments.config.as_deref().map(std::path::absolute).transpose()?;
    let resolved = Resolver::new(installation.clone()).resolve(requested.as_deref()).await;
    let told = match &resolved {
        Ok(resolved) => ask_launcher(&installation, &resolved.config).await,
        Err(_) => None,
    };
    let mut findings = host::examine(resolved.as_ref().ok(), told.as_ref().and_then(|told| told.as_ref().ok()));
    findings.extend(configuration::examine(&installation, &resolved, told.as_ref()).await);
    findings.extend(containerd::examine(&installation).await);
    format.print(&findings, |findings| text(findings))?;
    Ok(code(&findings, arguments.strict))
}

/// None when the launcher is not there.
async fn ask_launcher(
    installation: &Installation,
    config: &caisson_protocol::config::SandboxConfig,
) -> Option<anyhow::Result<Capabilities>> {
    let launcher = launcher::find(&installation.program_dirs, &config.hypervisor)?;
    Some(launcher::capabilities(&launcher, Some(config)).await)
}

fn code(findings: &[Finding], strict: bool) -> ExitCode {
    let worst = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Pass);
    let limit = if strict { Verdict::Pass } else { Verdict::Warn };
    if worst <= limit { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn text(findings: &[Finding]) -> String {
    let mut list = table(&["", "WHAT", "FOUND"]);
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Pass => "pass",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        };
        list.add_row([verdict, &finding.subject, &finding.found]);
        if let Some(remedy) = &finding.remedy {
            list.add_row(["", "", &format!("-> {remedy}")]);
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (pass, warn, fail) = (count(Verdict::Pass), count(Verdict::Warn), count(Verdict::Fail));
    format!("{}\n\n{pass} passed, {warn} warnings, {fail} failed", list.trim_fmt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings() -> Vec<Finding> {
        vec![Finding::pass("KVM", "runs guests"), Finding::warn("vsock", "missing", "modprobe vhost_vsock")]
    }

    #[test]
    fn a_remedy_stands_below_what_it_mends() {
        let text = text(&findings());
        let lines: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[2], ["warn", "vsock", "missing"]);
        assert_eq!(lines[3], ["->", "modprobe", "vhost_vsock"]);
        assert!(text.ends_with("1 passed, 1 warnings, 0 failed"), "{text}");
    }

    #[test]
    fn warnings_count_only_when_it_is_strict() {
        assert_eq!(code(&findings(), false), ExitCode::SUCCESS);
        assert_eq!(code(&findings(), true), ExitCode::FAILURE);
        assert_eq!(code(&[Finding::fail("KVM", "gone", "x")], false), ExitCode::FAILURE);
    }
}
