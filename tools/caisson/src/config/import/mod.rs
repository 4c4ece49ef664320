//! `caisson config import`: one of Kata Containers' configurations, of its Go or its Rust runtime, becomes one of ours.
//!
//! ```text
//! kata: file + drop-ins ──► settings ──► translate by the tables of agent, hypervisor and runtime ──► report
//! ```

mod agent;
mod convert;
mod hypervisor;
mod kata;
mod report;
mod rule;
mod runtime;
#[cfg(test)]
mod tests;
mod translate;

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use caisson_config_service::{
    defaults,
    installation::Installation,
    keys::{self, Key},
    resolve::Resolver,
};
use tempfile::NamedTempFile;

use crate::{launcher, output::Format};
use report::Report;
use translate::{KnownKeys, Translation};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  caisson config import /etc/kata-containers/configuration.toml
  caisson config import -o /etc/caisson/configuration.toml /opt/kata/share/defaults/kata-containers/configuration-clh.toml

Without --output the configuration is printed and the report goes to standard error.")]
pub(crate) struct Arguments {
    /// Kata Containers' configuration; drop-ins in config.d beside it are part of it.
    #[arg(value_name = "KATA-FILE")]
    file: PathBuf,
    /// Where to write ours; a file that exists is not overwritten.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) async fn run(installation: Installation, arguments: &Arguments, format: Format) -> anyhow::Result<()> {
    let kata = kata::read(&arguments.file)?;
    let known = known_keys(&installation, kata.hypervisor.as_deref()).await?;
    let Translation { text, entries, notes } = translate::translate(&kata, &known, &own_prefix()?);
    let problems = check(installation, &text).await?;
    if let Some(output) = &arguments.output {
        write_new(output, &text)?;
    }
    let report = Report {
        from: kata.file,
        drop_ins: kata.drop_ins,
        to: arguments.output.clone(),
        configuration: text,
        entries,
        notes,
        problems,
    };
    if format == Format::Text && report.to.is_none() {
        eprintln!("{}", report.text().trim_end());
        return format.print(&report, |report| report.configuration.clone());
    }
    format.print(&report, Report::text)
}

/// Of the installation that this program belongs to.
fn own_prefix() -> anyhow::Result<PathBuf> {
    let program = env::current_exe().context("find the running program")?;
    program.ancestors().nth(2).map(Path::to_owned).context("the running program is in no folder")
}

/// What our configuration of Kata's `hypervisor` may contain: the launcher's own keys only where it is installed.
async fn known_keys(installation: &Installation, hypervisor: Option<&str>) -> anyhow::Result<KnownKeys> {
    let names = |keys: &[Key]| keys.iter().map(|key| key.name.to_owned()).collect();
    let mut known = KnownKeys {
        hypervisor: names(keys::HYPERVISOR),
        agent: names(keys::AGENT),
        runtime: names(keys::RUNTIME),
        kernel: defaults::KERNEL.to_owned(),
    };
    let ours = hypervisor.and_then(hypervisor::ours);
    if let Some(launcher) = ours.and_then(|name| launcher::find(&installation.program_dirs, name)) {
        let options = launcher::options(&launcher).await?;
        for option in options.as_array().into_iter().flatten() {
            known.hypervisor.extend(option["key"].as_str().map(str::to_owned));
            if let ("kernel", Some(kernel)) = (option["key"].as_str().unwrap_or_default(), option["default"].as_str()) {
                known.kernel = kernel.to_owned();
            }
        }
    }
    Ok(known)
}

/// What is still wrong with `text` on this host, by line of what was written.
async fn check(installation: Installation, text: &str) -> anyhow::Result<Vec<String>> {
    let dir = tempfile::tempdir().context("make a temporary directory")?;
    let mut file = NamedTempFile::new_in(dir.path()).context("make a temporary file")?;
    file.write_all(text.as_bytes()).context("write a temporary file")?;
    let name = fs::canonicalize(file.path()).context("find a temporary file")?;
    Ok(match Resolver::new(installation).resolve(Some(&name)).await {
        Ok(_) => Vec::new(),
        Err(problems) => {
            let name = name.display().to_string();
            problems.sentences().into_iter().map(|sentence| sentence.replace(&format!("{name}:"), "line ")).collect()
        }
    })
}

fn write_new(output: &Path, text: &str) -> anyhow::Result<()> {
    let attempt = || format!("write {}", output.display());
    match fs::OpenOptions::new().write(true).create_new(true).open(output) {
        Ok(mut file) => file.write_all(text.as_bytes()).with_context(attempt),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!("{} exists: move it away first, or choose another --output", output.display())
        }
        Err(error) => Err(error).with_context(attempt),
    }
}
