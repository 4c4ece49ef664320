//! The runtimes in containerd's own configuration, in the form of 1.6 and 1.7 (version 2) or of 2.x (version 3).

use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use toml_edit::{Array, DocumentMut, Item, Table, TableLike, TomlError, value};

use super::runtimes::Runtime;

/// Where it is by default.
pub(crate) const CONFIG: &str = "/etc/containerd/config.toml";
/// The shim's program.
pub(crate) const SHIM: &str = "containerd-shim-caisson-v2";
/// How containerd finds it by name.
const RUNTIME_TYPE: &str = "io.containerd.caisson.v2";
/// containerd's own default.
const RUNC: &str = "runc";
const RUNC_COMMENT: &str =
    "\n# By `caisson install`: containerd's default, which it drops when other runtimes are configured.\n";
/// Annotations of a pod that reach the shim.
const ANNOTATIONS: [&str; 2] = ["io.caisson.*", "io.katacontainers.*"];

/// Which of containerd's forms a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// `version = 2`
    Two,
    /// `version = 3`
    Three,
}

impl Format {
    /// The form of a new file for what `containerd --version` says; 2 is read by all of them.
    pub(super) fn of_release(version: Option<&str>) -> Self {
        let numbers = version.into_iter().flat_map(str::split_whitespace).map(|word| word.trim_start_matches('v'));
        let mut majors = numbers.filter_map(|word| word.split_once('.')?.0.parse::<u32>().ok());
        if majors.next().is_some_and(|major| major >= 2) { Self::Three } else { Self::Two }
    }

    fn of_file(document: &DocumentMut) -> anyhow::Result<Option<Self>> {
        match document.get("version").map(|version| version.as_integer()) {
            None if document.iter().next().is_none() => Ok(None),
            Some(Some(2)) => Ok(Some(Self::Two)),
            // Later ones keep the tables of version 3.
            Some(Some(3..)) => Ok(Some(Self::Three)),
            None | Some(Some(_)) => {
                bail!("it is in containerd's version 1; convert it first: containerd config migrate")
            }
            Some(None) => bail!("its version is no number"),
        }
    }

    fn number(self) -> i64 {
        match self {
            Self::Two => 2,
            Self::Three => 3,
        }
    }

    fn plugin(self) -> &'static str {
        match self {
            Self::Two => "io.containerd.grpc.v1.cri",
            Self::Three => "io.containerd.cri.v1.runtime",
        }
    }
}

fn parse(text: &str) -> anyhow::Result<DocumentMut> {
    text.parse().map_err(|error: TomlError| {
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        anyhow!("it is no TOML: line {line}: {}", error.message().replace('\n', ", "))
    })
}

/// The text with the runtimes in it.
#[derive(Debug)]
pub(super) struct Registration {
    pub(super) text: String,
    /// What keeps it from being of use.
    pub(super) notes: Vec<String>,
}

/// Adds `runtimes` to `text`, and takes away others of ours; a new file gets the form `new`. Everything else stays as
/// it is, comments too.
pub(super) fn register(text: &str, new: Format, runtimes: &[Runtime]) -> anyhow::Result<Registration> {
    let mut document: DocumentMut = parse(text)?;
    let format = match Format::of_file(&document)? {
        Some(format) => format,
        None => {
            document.insert("version", value(new.number()));
            new
        }
    };
    let notes = disabled_notes(&document, format);
    let needs_runc = default_runtime(&document, format).is_none_or(|name| name == RUNC);
    let table = runtimes_table(&mut document, format)?;
    if needs_runc && table.get(RUNC).is_none() {
        table.insert(RUNC, Item::Table(runc()));
    }
    let expected = |name: &str| runtimes.iter().any(|runtime| runtime.handler == name);
    remove_ours(table, |name| !expected(name));
    for runtime in runtimes {
        table.insert(&runtime.handler, Item::Table(entry(runtime)));
    }
    Ok(Registration { text: document.to_string(), notes })
}

/// Takes every runtime of ours away.
pub(super) fn unregister(text: &str) -> anyhow::Result<Registration> {
    let mut document: DocumentMut = parse(text)?;
    let Some(format) = Format::of_file(&document)? else {
        return Ok(Registration { text: text.to_owned(), notes: Vec::new() });
    };
    let mut notes = Vec::new();
    if let Some(default) = default_runtime(&document, format).filter(|name| name.starts_with("caisson")) {
        notes.push(format!("default_runtime_name is still \"{default}\": choose another"));
    }
    let table = runtimes_table(&mut document, format)?;
    remove_ours(table, |_| true);
    let only_runc = table.len() == 1 && table.get(RUNC).and_then(Item::as_table).is_some_and(is_our_runc);
    if only_runc {
        table.remove(RUNC);
    }
    Ok(Registration { text: document.to_string(), notes })
}

/// A runtime of ours that containerd knows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Registered {
    pub(crate) name: String,
    pub(crate) config_path: Option<PathBuf>,
}

/// The runtimes of ours in `text`, in either form.
pub(crate) fn registered(text: &str) -> anyhow::Result<Vec<Registered>> {
    let document: DocumentMut = parse(text)?;
    let tables = [Format::Two, Format::Three].into_iter().filter_map(|format| {
        document.get("plugins")?.get(format.plugin())?.get("containerd")?.get("runtimes")?.as_table_like()
    });
    let ours = tables.flat_map(TableLike::iter).filter(|(_, runtime)| is_ours(runtime));
    Ok(ours.map(|(name, runtime)| Registered { name: name.to_owned(), config_path: config_path(runtime) }).collect())
}

fn config_path(runtime: &Item) -> Option<PathBuf> {
    let path = runtime.get("options")?.get("ConfigPath")?.as_str()?;
    (!path.is_empty()).then(|| path.into())
}

fn is_ours(runtime: &Item) -> bool {
    runtime.get("runtime_type").and_then(Item::as_str) == Some(RUNTIME_TYPE)
}

fn remove_ours(runtimes: &mut dyn TableLike, unwanted: impl Fn(&str) -> bool) {
    let ours = runtimes.iter().filter(|(name, runtime)| is_ours(runtime) && unwanted(name));
    let names: Vec<_> = ours.map(|(name, _)| name.to_owned()).collect();
    for name in names {
        runtimes.remove(&name);
    }
}

/// containerd has this runtime, its default, only as long as no other is configured; without it CRI does not start.
fn runc() -> Table {
    let mut table = Table::new();
    table.decor_mut().set_prefix(RUNC_COMMENT);
    table.insert("runtime_type", value("io.containerd.runc.v2"));
    table
}

/// Whether nobody has changed it since.
fn is_our_runc(table: &Table) -> bool {
    table.len() == 1 && table.decor().prefix().and_then(|prefix| prefix.as_str()) == Some(RUNC_COMMENT)
}

fn entry(runtime: &Runtime) -> Table {
    let mut table = Table::new();
    table.insert("runtime_type", value(RUNTIME_TYPE));
    if let Some(shim) = &runtime.shim {
        table.insert("runtime_path", value(shim.display().to_string()));
    }
    table.insert("pod_annotations", value(Array::from_iter(ANNOTATIONS)));
    // The host's devices mean nothing in the guest.
    table.insert("privileged_without_host_devices", value(true));
    if let Some(config_path) = &runtime.config_path {
        let mut options = Table::new();
        options.insert("ConfigPath", value(config_path.display().to_string()));
        table.insert("options", Item::Table(options));
    }
    table
}

fn runtimes_table(document: &mut DocumentMut, format: Format) -> anyhow::Result<&mut dyn TableLike> {
    let mut table: &mut dyn TableLike = document.as_table_mut();
    for name in ["plugins", format.plugin(), "containerd", "runtimes"] {
        let implicit = || {
            let mut table = Table::new();
            // Without a heading of its own.
            table.set_implicit(true);
            Item::Table(table)
        };
        let item = table.entry(name).or_insert_with(implicit);
        table = item.as_table_like_mut().with_context(|| format!("\"{name}\" is no table"))?;
    }
    Ok(table)
}

fn default_runtime(document: &DocumentMut, format: Format) -> Option<String> {
    let containerd = document.get("plugins")?.get(format.plugin())?.get("containerd")?;
    containerd.get("default_runtime_name")?.as_str().map(str::to_owned)
}

/// Docker's packages switch CRI off.
fn disabled_notes(document: &DocumentMut, format: Format) -> Vec<String> {
    let disabled = document.get("disabled_plugins").and_then(Item::as_array).into_iter().flatten();
    let mut names = disabled.filter_map(|name| name.as_str());
    match names.find(|name| *name == "cri" || *name == format.plugin()) {
        Some(name) => vec![format!(
            "containerd's configuration has disabled_plugins = [\"{name}\"]: take that out if Kubernetes shall use it"
        )],
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtimes() -> Vec<Runtime> {
        let runtime = |handler: &str, config_path: Option<&str>| Runtime {
            handler: handler.into(),
            hypervisor: None,
            config_path: config_path.map(PathBuf::from),
            shim: None,
        };
        vec![runtime("caisson", None), runtime("caisson-fc", Some("/usr/share/defaults/caisson/configuration-fc.toml"))]
    }

    fn registered_text(text: &str) -> String {
        register(text, Format::Two, &runtimes()).unwrap().text
    }

    #[test]
    fn a_new_file_gets_the_form_of_the_release() {
        assert_eq!(
            Format::of_release(Some("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20")),
            Format::Two
        );
        let two = "containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7";
        assert_eq!(Format::of_release(Some(two)), Format::Three);
        assert_eq!(Format::of_release(None), Format::Two);
    }

    #[test]
    fn the_whole_of_a_new_file() {
        let expected = r#"version = 2

# By `caisson install`: containerd's default, which it drops when other runtimes are configured.
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.caisson]
runtime_type = "io.containerd.caisson.v2"
pod_annotations = ["io.caisson.*", "io.katacontainers.*"]
privileged_without_host_devices = true

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.caisson-fc]
runtime_type = "io.containerd.caisson.v2"
pod_annotations = ["io.caisson.*", "io.katacontainers.*"]
privileged_without_host_devices = true

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.caisson-fc.options]
ConfigPath = "/usr/share/defaults/caisson/configuration-fc.toml"
"#;
        assert_eq!(registered_text(""), expected);
    }

    #[test]
    fn registering_twice_changes_nothing() {
        let once = registered_text("version = 2\n# mine\n[grpc]\n  address = \"/x\"\n");
        assert_eq!(registered_text(&once), once);
    }

    #[test]
    fn everything_else_stays_with_its_comments_and_spaces() {
        let text = "version = 3 # since 2.0\n\n# runc\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\n  \
                    runtime_type = 'io.containerd.runc.v2' # mine\n";
        let registered = registered_text(text);
        assert!(registered.starts_with(text), "{registered}");
        assert!(registered.contains("containerd.runtimes.caisson-fc.options]"), "{registered}");
        assert_eq!(unregister(&registered).unwrap().text, text);
    }

    #[test]
    fn the_default_runtime_is_kept_alive_and_goes_again_with_ours() {
        let text = "version = 2\n[grpc]\naddress = \"/x\"\n";
        assert!(registered_text(text).contains("containerd.runtimes.runc]"));
        assert_eq!(unregister(&registered_text(text)).unwrap().text, text);
        let other =
            format!("{text}[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndefault_runtime_name = \"crun\"\n");
        assert!(!registered_text(&other).contains("containerd.runtimes.runc]"));
    }

    #[test]
    fn a_runtime_that_is_no_longer_offered_goes() {
        let text = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.caisson-old]\n\
                    runtime_type = \"io.containerd.caisson.v2\"\n";
        assert!(!registered_text(text).contains("caisson-old"));
    }

    #[test]
    fn what_is_registered_is_found_in_both_forms() {
        let three = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]\n\
                     runtime_type = 'io.containerd.kata.v2'\n";
        for text in ["", three] {
            let found = registered(&registered_text(text)).unwrap();
            let names: Vec<_> = found.iter().map(|runtime| runtime.name.as_str()).collect();
            assert_eq!(names, ["caisson", "caisson-fc"]);
            assert_eq!(found[1].config_path.as_deref(), runtimes()[1].config_path.as_deref());
        }
    }

    #[test]
    fn the_form_of_containerd_before_1_2_is_refused() {
        let told = register("[plugins.cri]\n", Format::Two, &runtimes()).unwrap_err().to_string();
        assert_eq!(told, "it is in containerd's version 1; convert it first: containerd config migrate");
    }

    #[test]
    fn a_value_where_a_table_should_be_is_named() {
        let told = register("version = 2\nplugins = 1\n", Format::Two, &runtimes()).unwrap_err().to_string();
        assert_eq!(told, "\"plugins\" is no table");
    }

    #[test]
    fn a_plugin_that_is_switched_off_is_told() {
        let text = "version = 2\ndisabled_plugins = [\"cri\"]\n";
        let notes = register(text, Format::Two, &runtimes()).unwrap().notes;
        assert!(notes[0].contains("disabled_plugins = [\"cri\"]"), "{notes:?}");
    }

    #[test]
    fn a_default_that_goes_is_told() {
        let text =
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndefault_runtime_name = \"caisson\"\n";
        assert_eq!(unregister(text).unwrap().notes, ["default_runtime_name is still \"caisson\": choose another"]);
    }
}
