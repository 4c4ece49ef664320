//! The page that explains every key, written from the keys themselves.

use crate::{
    hypervisor::KNOWN,
    installation::Installation,
    key_doc::{self, KeyDoc},
    launchers::{LauncherOption, Launchers},
    watch::Watch,
};

/// The page as Markdown, with what installed launchers tell of their options.
pub async fn generate(installation: &Installation) -> String {
    let mut launchers = Launchers::default();
    let mut options = Vec::new();
    for known in &KNOWN {
        let told = launchers.options(installation, known.name, &mut Watch::new()).await;
        options.push((known.name, told.map(|options| options.to_vec()).unwrap_or_default()));
    }
    page(&options)
}

/// The page for launchers with these options, by their hypervisors' names.
pub fn page(options: &[(&str, Vec<LauncherOption>)]) -> String {
    let mut page = INTRODUCTION.to_owned();
    page.push_str("\n## `[hypervisor.<name>]`\n\n");
    page.push_str(&table(&key_doc::common(&[])));
    for known in &KNOWN {
        let Some((_, options)) = options.iter().find(|(name, _)| *name == known.name) else { continue };
        let synonym = known.synonym.map_or_else(String::new, |synonym| format!(", or `[hypervisor.{synonym}]`"));
        page.push_str(&format!("\n## `[hypervisor.{}]`{synonym}\n\n", known.name));
        page.push_str(&of_launcher(known.title, options));
    }
    page.push_str("\n## `[agent]`, or `[agent.kata]`\n\n");
    page.push_str(&table(&key_doc::agent()));
    page.push_str("\n## `[runtime]`\n\n");
    page.push_str(&table(&key_doc::runtime()));
    page
}

const INTRODUCTION: &str = "# Options

Written from the types that read them; `caisson config reference` prints this page for what is installed.

**Where they are read.** The first of: containerd's runtime option `config_path`; the variable `CAISSON_CONF_FILE`;
`/etc/caisson/configuration.toml`; `share/defaults/caisson/configuration.toml` of the prefix that caisson is installed
in. The file may be a symbolic link. Over it are laid `config.d/*.toml` beside the file and then beside the link, each
in the order of their names: tables merge, everything else replaces. `/etc/caisson/config.d` is laid over the prefix's file
too.

**Which hypervisor.** `[runtime] hypervisor`, or else the file's only table `[hypervisor.<name>]`. Drop-ins may keep
tables for others.

**Annotations.** `io.caisson.config.<table>.<key>`, with `hypervisor`, `agent` or `runtime` for the table, is laid over
the files for one pod, as far as `enable_annotations` allows. `io.katacontainers.config.<table>.<key>` means the same.

**Size.** What containerd says of a pod's limits (`io.kubernetes.cri.sandbox-cpu-quota`, `-cpu-period`, `-memory`) makes
its virtual machine as large: as many vCPUs as its CPU limit allows, rounded up, though no more than the host has; memory
for its limit beside `default_memory`.
";

fn of_launcher(title: &str, options: &[LauncherOption]) -> String {
    let own = key_doc::own(options);
    let common = key_doc::common(&[]);
    let other: Vec<_> = key_doc::common(options)
        .into_iter()
        .filter(|key| !common.contains(key))
        .map(|key| format!("`{} = {}`", key.name, key.default))
        .collect();
    let mut text = match &other[..] {
        [] => format!("Every hypervisor's keys, for {title}.\n"),
        other => format!("Every hypervisor's keys, for {title} with other defaults: {}.\n", other.join(", ")),
    };
    if !own.is_empty() {
        text.push_str("Besides:\n\n");
        text.push_str(&table(&own));
    }
    text
}

fn table(keys: &[KeyDoc]) -> String {
    let mut text = "| key | takes | default | meaning |\n|---|---|---|---|\n".to_owned();
    for KeyDoc { name, accepts, default, meaning } in keys {
        let (accepts, meaning) = (cell(accepts), cell(meaning));
        text.push_str(&format!("| `{name}` | {accepts} | `{default}` | {meaning} |\n"));
    }
    text
}

/// Markdown takes some characters for its own.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('*', "\\*").replace('<', "&lt;")
}
