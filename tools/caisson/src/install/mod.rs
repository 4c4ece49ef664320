//! `caisson install` and `uninstall`: from a folder with the programs to a host that runs sandboxes, and back.

mod artifacts;
pub(crate) mod containerd;
mod edit;
mod files;
mod manual;
mod record;
mod runtime_class;
mod runtimes;
mod uninstall;

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use caisson_config_service::installation::Installation;
use serde::Serialize;

pub(crate) use manual::completions_of as completions;
pub(crate) use uninstall::{Arguments as UninstallArguments, run as undo};

use crate::{output::Format, program};
use edit::Edited;
use files::{Outcome, Placed};
use record::Record;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  caisson install --dry-run                  what would change, as a diff
  caisson install                            into /usr/local, and registered with containerd
  caisson install --prefix /opt/caisson
  caisson install --prefix /usr --destdir build/package     for a package: files only

Installing again changes only what is different. What you have changed since is kept and named.")]
pub(crate) struct Arguments {
    /// Where programs (bin) and data (share) go.
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Write below this directory as if it were /, and leave containerd alone: for packages.
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
    /// containerd's configuration.
    #[arg(long, value_name = "FILE", default_value = containerd::CONFIG)]
    containerd_config: PathBuf,
    /// Do not register the runtimes with containerd.
    #[arg(long)]
    no_containerd: bool,
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
    next: Vec<String>,
}

pub(crate) async fn run(arguments: Arguments, format: Format) -> anyhow::Result<()> {
    let prefix = absolute_prefix(&arguments.prefix)?;
    let source = own_folder()?;
    let installation = Installation::of_this_program();
    let destination = files::Destination::new(arguments.destdir.as_deref(), arguments.dry_run);

    let artifacts = artifacts::all(&installation, &source, &prefix).await?;
    let known = Record::load(&destination, &prefix)?;
    let mut notes = artifacts.notes;
    // Before the first file is written, so that a containerd that cannot be registered with leaves nothing half done.
    let registered = match (arguments.no_containerd, &arguments.destdir) {
        (true, _) | (_, Some(_)) => None,
        (false, None) => register(&arguments, &installation, &prefix, &mut notes).await?,
    };
    let mut placed = Vec::new();
    for artifact in &artifacts.files {
        placed.push(destination.place(artifact, known.digest_of(&artifact.path))?);
    }
    let containerd = match registered {
        Some(edit) => Some(edit::apply(&edit.file, edit.before, edit.after, arguments.dry_run)?),
        None => None,
    };
    let config = containerd.as_ref().map(|edited| edited.file.clone()).or(known.containerd_config.clone());
    Record::of(&artifacts.files, &placed, config).save(&destination, &prefix)?;

    let next = next_steps(&prefix, &placed, containerd.as_ref(), arguments.destdir.is_some());
    let report = Report { dry_run: arguments.dry_run, files: placed, containerd, notes, next };
    format.print(&report, text)
}

/// The folder with the programs: where this one lies.
fn own_folder() -> anyhow::Result<PathBuf> {
    let program = env::current_exe().context("find the running program")?;
    program.parent().map(Path::to_owned).context("the running program is in no folder")
}

fn absolute_prefix(prefix: &Path) -> anyhow::Result<PathBuf> {
    if !prefix.is_absolute() {
        bail!("--prefix {}: not an absolute path", prefix.display());
    }
    Ok(prefix.to_owned())
}

/// What containerd's configuration is to become.
struct Edit {
    file: PathBuf,
    before: Option<String>,
    after: String,
}

/// None, with a note, where there is no containerd to register with.
async fn register(
    arguments: &Arguments,
    installation: &Installation,
    prefix: &Path,
    notes: &mut Vec<String>,
) -> anyhow::Result<Option<Edit>> {
    let file = std::path::absolute(&arguments.containerd_config).context("find containerd's configuration")?;
    let before = edit::read(&file)?;
    let version = match program::find(&installation.program_dirs, "containerd") {
        Some(containerd) => Some(program::version(&containerd).await?),
        None => None,
    };
    if before.is_none() && version.is_none() {
        notes.push(format!("containerd is not installed and {} does not exist: nothing is registered", file.display()));
        return Ok(None);
    }
    let runtimes = runtimes::all(prefix);
    let registration = containerd::register(
        before.as_deref().unwrap_or_default(),
        containerd::Format::of_release(version.as_deref()),
        &runtimes,
    );
    let registration = registration.with_context(|| format!("register with containerd in {}", file.display()))?;
    notes.extend(registration.notes);
    let ignores_path = version.as_deref().is_some_and(|version| version.contains(" 1.6."));
    if let Some(shim) = runtimes.iter().find_map(|runtime| runtime.shim.as_ref()).filter(|_| ignores_path) {
        let folder = "/usr/local/bin";
        notes.push(format!("containerd 1.6 ignores runtime_path: ln -s {} {folder}", shim.display()));
    }
    Ok(Some(Edit { file, before, after: registration.text }))
}

fn next_steps(prefix: &Path, placed: &[Placed], containerd: Option<&Edited>, is_package: bool) -> Vec<String> {
    if is_package {
        return Vec::new();
    }
    let mut steps = Vec::new();
    if placed.iter().any(|placed| placed.outcome.is_change() && placed.path.ends_with(artifacts::SOCKET_UNIT)) {
        steps.push(format!("systemctl daemon-reload && systemctl enable --now {}", artifacts::SOCKET_UNIT));
    }
    if let Some(edited) = containerd {
        if edited.is_change() {
            steps.push("systemctl restart containerd".to_owned());
        }
        let classes = artifacts::runtime_classes_dir(prefix);
        steps.push(format!("for Kubernetes: kubectl apply -f {}", classes.display()));
    }
    steps.push("caisson check".to_owned());
    steps
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut unchanged = 0;
    for placed in &report.files {
        match placed.outcome {
            Outcome::Unchanged => unchanged += 1,
            outcome => text.push_str(&format!("{:9} {}\n", outcome.word(), placed.path.display())),
        }
    }
    if unchanged > 0 {
        text.push_str(&format!("{unchanged} files are as they should be\n"));
    }
    if let Some(edited) = &report.containerd {
        text.push('\n');
        text.push_str(&edited.text());
    }
    report.notes.iter().for_each(|note| text.push_str(&format!("\nnote: {note}\n")));
    if report.dry_run {
        text.push_str("\nnothing was changed: --dry-run\n");
    } else if !report.next.is_empty() {
        text.push_str("\nnext:\n");
        report.next.iter().for_each(|step| text.push_str(&format!("  {step}\n")));
    }
    text
}
