//! `caisson hypervisor show NAME`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use caisson_config_service::{hypervisor, installation::Installation, resolve::Resolver, switch};
use serde::Serialize;

use super::{
    configuration_of,
    features::{self, Answer},
    known::{self, Known},
};
use crate::{
    launcher::{self, Capabilities},
    output::{Format, table},
};

/// All there is to tell of one hypervisor.
#[derive(Serialize)]
struct Shown {
    name: String,
    #[serde(flatten)]
    known: Option<&'static Known>,
    /// Whether new sandboxes get it.
    in_force: bool,
    /// The file by which it was asked; none where the launcher chose.
    configuration: Option<PathBuf>,
    /// Why no sandbox can be made by that file.
    problems: Vec<String>,
    launcher: PathBuf,
    /// The hypervisor's own.
    program: PathBuf,
    capabilities: Capabilities,
    /// As `caisson-vmm-<name> options` tells them.
    options: serde_json::Value,
}

pub(super) async fn run(installation: Installation, name: &str, format: Format) -> anyhow::Result<()> {
    let name = hypervisor::canonical(name);
    let launcher = match launcher::find(&installation.program_dirs, name) {
        Some(launcher) => launcher,
        None => bail!("{}", not_installed(&installation, name)),
    };
    let configurations = switch::list(&mut Resolver::new(installation)).await;
    let configuration = configuration_of(&configurations, name);
    let config = configuration.map(|listed| &listed.config);
    let capabilities = launcher::capabilities(&launcher, config).await.with_context(|| format!("ask about {name}"))?;
    let options = launcher::options(&launcher).await?;
    let shown = Shown {
        name: name.to_owned(),
        known: known::find(name),
        in_force: configuration.is_some_and(|listed| listed.in_force),
        configuration: configuration.map(|listed| listed.path.clone()),
        problems: configuration.map(|listed| listed.problems.clone()).unwrap_or_default(),
        program: capabilities.program(&launcher),
        launcher,
        capabilities,
        options,
    };
    format.print(&shown, text)
}

/// Tells apart a hypervisor that could be had and a name that means nothing.
fn not_installed(installation: &Installation, name: &str) -> String {
    let dirs: Vec<_> = installation.program_dirs.iter().map(|dir| dir.display().to_string()).collect();
    if known::find(name).is_some() {
        return format!("caisson-vmm-{name} is not installed: looked in {}", dirs.join(", "));
    }
    let names: Vec<_> = known::ALL.iter().map(|known| known.name).collect();
    format!("there is no hypervisor \"{}\"; accepted: {}", name.escape_debug(), names.join(", "))
}

fn text(shown: &Shown) -> String {
    let told = &shown.capabilities;
    let mut facts = vec![("name", shown.name.clone())];
    if let Some(known) = shown.known {
        facts.push(("other name", known::short(known.name).to_owned()));
        facts.push(("chosen for", known.purpose.to_owned()));
        facts.push(("type", known.kind.to_owned()));
        facts.push(("architectures", known.architectures.join(" ")));
    }
    facts.push(("in force", if shown.in_force { "yes" } else { "no" }.to_owned()));
    let file = shown.configuration.as_ref().map(|file| file.display().to_string());
    facts.push(("configuration", file.unwrap_or_else(|| "none".to_owned())));
    facts.extend(shown.problems.iter().map(|problem| ("cannot be used", problem.clone())));
    facts.push(("launcher", shown.launcher.display().to_string()));
    facts.push(("program", shown.program.display().to_string()));
    facts.push(("version", told.version.clone()));
    let by = if told.accelerator.is_empty() { "nothing" } else { &told.accelerator };
    facts.push(("runs by", format!("{by} ({})", told.accelerator_reason)));
    for (name, words) in [("devices", &told.devices), ("hotplug", &told.hotplug), ("operations", &told.operations)] {
        facts.push((name, if words.is_empty() { "none".to_owned() } else { words.join(" ") }));
    }
    for feature in &features::ALL {
        let answer = match feature.of(told) {
            Answer::Yes => "yes".to_owned(),
            Answer::No(why) => format!("no: {why}"),
        };
        facts.push((feature.words, answer));
    }
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let mut text: String = facts.iter().map(|(name, fact)| format!("{name:width$}  {fact}\n")).collect();
    text.push_str(&format!("\n[hypervisor.{}] also takes:\n\n{}", shown.name, keys(&shown.options)));
    text
}

fn keys(options: &serde_json::Value) -> String {
    let mut list = table(&["KEY", "DEFAULT", "MEANING"]);
    for option in options.as_array().into_iter().flatten() {
        let word = |name: &str| option[name].as_str().unwrap_or_default().to_owned();
        list.add_row([word("key"), option["default"].to_string(), word("doc")]);
    }
    list.trim_fmt()
}
