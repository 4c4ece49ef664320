//! `caisson hypervisor use`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use caisson_config_service::{
    hypervisor,
    installation::Installation,
    resolve::Resolver,
    switch::{self, Switched},
};
use serde::Serialize;

use crate::output::Format;

#[derive(clap::Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Arguments {
    /// qemu, cloud-hypervisor (clh), firecracker (fc), builtin (dragonball), stratovirt or acrn.
    #[arg(conflicts_with = "previous")]
    name: Option<String>,
    /// The configuration to use, instead of the hypervisor's shipped one.
    #[arg(long, value_name = "FILE", conflicts_with = "previous")]
    config: Option<PathBuf>,
    /// Go back to what was in force before the last change.
    #[arg(long)]
    previous: bool,
}

/// What new sandboxes get from now on.
#[derive(Serialize)]
struct Used {
    /// None when it is the installation's own again.
    configuration: Option<PathBuf>,
    /// None when there was none.
    previous: Option<PathBuf>,
}

pub(super) async fn run(installation: Installation, arguments: Arguments, format: Format) -> anyhow::Result<()> {
    let mut resolver = Resolver::new(installation);
    let switched = match (&arguments.config, &arguments.name) {
        (Some(file), name) => use_file(&mut resolver, file, name.as_deref()).await?,
        (None, Some(name)) => switch::use_configuration(&mut resolver, name).await?,
        (None, None) => switch::use_previous(&mut resolver).await?,
    };
    format.print(&Used { configuration: switched.now, previous: switched.before }, text)
}

async fn use_file(resolver: &mut Resolver, file: &Path, name: Option<&str>) -> anyhow::Result<Switched> {
    let file = std::path::absolute(file).with_context(|| format!("use {}", file.display()))?;
    if let Some(expected) = name.map(hypervisor::canonical) {
        let found = resolver.resolve(Some(&file)).await?.config.hypervisor;
        if found != expected {
            bail!("{} is for {found}, not for {expected}", file.display());
        }
    }
    Ok(switch::use_configuration(resolver, &file.to_string_lossy()).await?)
}

fn text(used: &Used) -> String {
    let now = match &used.configuration {
        Some(configuration) => configuration.display().to_string(),
        None => "the installation's own configuration".to_owned(),
    };
    let undo = "`caisson hypervisor use --previous` takes it back";
    match &used.previous {
        Some(previous) => format!("new sandboxes use {now}\nbefore: {}; {undo}", previous.display()),
        None => format!("new sandboxes use {now}\n{undo}"),
    }
}
