//! `caisson uninstall`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use caisson_protocol::paths;
use serde::Serialize;

use super::{
    absolute_prefix, artifacts, containerd, edit,
    edit::Edited,
    files::{Destination, Placed},
    record::Record,
};
use crate::{output::Format, sandbox};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  caisson uninstall --dry-run
  caisson uninstall --prefix /opt/caisson

Files that you have changed since the installation are kept and named; so is /etc/caisson.")]
pub(crate) struct Arguments {
    /// The prefix that it was installed to.
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// The root that it was installed to.
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
    /// Only tell what would be done.
    #[arg(long)]
    dry_run: bool,
}

/// What was done, or would be.
#[derive(Serialize)]
struct Report {
    dry_run: bool,
    files: Vec<Placed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    containerd: Option<Edited>,
    notes: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments, format: Format) -> anyhow::Result<()> {
    let prefix = absolute_prefix(&arguments.prefix)?;
    let destination = Destination::new(arguments.destdir.as_deref(), arguments.dry_run);
    let record = Record::load(&destination, &prefix)?;
    if record.files.is_empty() {
        bail!("caisson is not installed in {}: there is no {}", prefix.display(), Record::path(&prefix).display());
    }
    if arguments.destdir.is_none() {
        refuse_while_in_use()?;
    }
    let mut notes = Vec::new();
    let containerd = match &record.containerd_config {
        Some(file) => unregister(file, arguments.dry_run, &mut notes)?,
        None => None,
    };
    let mut removed = Vec::new();
    for file in &record.files {
        removed.extend(destination.remove(&file.path, &file.sha256, file.is_program)?);
    }
    if !arguments.dry_run {
        let record = destination.resolve(&Record::path(&prefix));
        fs::remove_file(&record).with_context(|| format!("remove {}", record.display()))?;
        remove_own_dirs(&destination, &prefix);
    }
    let had_socket = removed.iter().any(|placed| placed.path.ends_with(artifacts::SOCKET_UNIT));
    if had_socket && arguments.destdir.is_none() {
        if !arguments.dry_run {
            disable(Path::new(artifacts::ENABLED_SOCKET));
        }
        let socket = artifacts::SOCKET_UNIT;
        notes.push(format!("where systemd has the socket: systemctl daemon-reload && systemctl stop {socket}"));
    }
    if containerd.as_ref().is_some_and(Edited::is_change) {
        notes.push("containerd still knows the runtimes until it is restarted: systemctl restart containerd".into());
    }
    format.print(&Report { dry_run: arguments.dry_run, files: removed, containerd, notes }, text)
}

/// A sandbox needs its programs until its end.
fn refuse_while_in_use() -> anyhow::Result<()> {
    let running = sandbox::all(&paths::sandboxes_dir())?;
    match running.as_slice() {
        [] => Ok(()),
        running => {
            let names: Vec<_> = running.iter().map(|sandbox| sandbox.record.id.as_str()).collect();
            bail!("sandboxes are running: {}; end them first", names.join(", "))
        }
    }
}

fn unregister(file: &Path, dry_run: bool, notes: &mut Vec<String>) -> anyhow::Result<Option<Edited>> {
    let Some(before) = edit::read(file)? else { return Ok(None) };
    let registration =
        containerd::unregister(&before).with_context(|| format!("take the runtimes out of {}", file.display()))?;
    notes.extend(registration.notes);
    edit::apply(file, Some(before), registration.text, dry_run).map(Some)
}

/// Removes what `systemctl enable` made, unless it leads to somebody's unit.
fn disable(enabled: &Path) {
    if enabled.is_symlink() && !enabled.exists() {
        // It leads nowhere: systemd passes it over.
        let _ = fs::remove_file(enabled);
    }
}

fn remove_own_dirs(destination: &Destination, prefix: &Path) {
    let classes = artifacts::runtime_classes_dir(prefix);
    for dir in [&classes, &prefix.join("share/caisson"), &prefix.join("share/defaults/caisson")] {
        // What is not empty holds somebody's files.
        let _ = fs::remove_dir(destination.resolve(dir));
    }
}

fn text(report: &Report) -> String {
    let line = |placed: &Placed| format!("{:9} {}\n", placed.outcome.word(), placed.path.display());
    let mut text: String = report.files.iter().map(line).collect();
    if let Some(edited) = &report.containerd {
        text.push('\n');
        text.push_str(&edited.text());
    }
    report.notes.iter().for_each(|note| text.push_str(&format!("\nnote: {note}\n")));
    if report.dry_run {
        text.push_str("\nnothing was changed: --dry-run\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn an_enabled_socket_goes_with_its_unit_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let (unit, enabled) = (dir.path().join("unit"), dir.path().join("enabled"));
        fs::write(&unit, "").unwrap();
        symlink(&unit, &enabled).unwrap();
        disable(&enabled);
        assert!(enabled.is_symlink());
        fs::remove_file(&unit).unwrap();
        disable(&enabled);
        assert!(!enabled.is_symlink());
    }
}
