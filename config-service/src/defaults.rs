//! The commented configuration of each hypervisor, written from the keys themselves, and which of them a host gets.

use std::path::{Path, PathBuf};

use toml::Value;

use crate::{
    hypervisor::{KNOWN, Known},
    installation::Installation,
    key_doc::{self, KeyDoc},
    launchers::{LauncherOption, Launchers, Silence},
    watch::Watch,
};

/// A file below `share/defaults/caisson` of an installation's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultFile {
    /// Its name.
    pub name: &'static str,
    /// Which hypervisor it is for, canonical.
    pub hypervisor: &'static str,
}

/// All of them, one for each name that people look for.
pub const FILES: [DefaultFile; 7] = [
    DefaultFile { name: "configuration-qemu.toml", hypervisor: "qemu" },
    DefaultFile { name: "configuration-clh.toml", hypervisor: "cloud-hypervisor" },
    DefaultFile { name: "configuration-fc.toml", hypervisor: "firecracker" },
    DefaultFile { name: "configuration-builtin.toml", hypervisor: "builtin" },
    DefaultFile { name: "configuration-dragonball.toml", hypervisor: "builtin" },
    DefaultFile { name: "configuration-stratovirt.toml", hypervisor: "stratovirt" },
    DefaultFile { name: "configuration-acrn.toml", hypervisor: "acrn" },
];

/// The hypervisor of a host on which the built-in VMM cannot run.
const FALLBACK: DefaultFile = FILES[0];
/// The hypervisor that needs nothing installed.
const PREFERRED: DefaultFile = FILES[3];
/// image-builder's kernel in the format that most hypervisors boot, of an installation below `/usr`.
pub const KERNEL: &str = "/usr/share/caisson/vmlinux";
/// Its initrd.
pub const INITRD: &str = "/usr/share/caisson/initrd.img";
/// Line width of prose.
const WIDTH: usize = 118;

/// The default file that a host should use, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recommendation {
    /// Which.
    pub file: DefaultFile,
    /// One sentence.
    pub reason: String,
}

/// Name and text of each of [`FILES`] for an installation below `prefix`. What an installed launcher tells of its
/// options is part of it.
pub async fn generate(installation: &Installation, prefix: &Path) -> Vec<(&'static str, String)> {
    let mut launchers = Launchers::default();
    let mut files = Vec::new();
    for file in FILES {
        let options = launchers.options(installation, file.hypervisor, &mut Watch::new()).await;
        files.push((file.name, text(file.hypervisor, &options.unwrap_or_default(), prefix)));
    }
    files
}

/// The built-in VMM where its launcher says that it can run guests here, otherwise QEMU.
pub async fn recommend(installation: &Installation) -> Recommendation {
    let told = Launchers::default().capabilities(installation, PREFERRED.hypervisor, ("", ""), &mut Watch::new()).await;
    match told {
        Ok(_) => Recommendation { file: PREFERRED, reason: "KVM runs guests on this host".to_owned() },
        Err(Silence::NotInstalled) => {
            Recommendation { file: FALLBACK, reason: "the built-in VMM is not installed".to_owned() }
        }
        Err(Silence::Failed(why)) => {
            Recommendation { file: FALLBACK, reason: format!("the built-in VMM is no choice: {why}") }
        }
    }
}

/// The configuration for `hypervisor`, whose launcher has `options`.
pub fn text(hypervisor: &str, options: &[LauncherOption], prefix: &Path) -> String {
    let known = KNOWN.iter().find(|known| known.name == hypervisor);
    let title = known.map_or(hypervisor, |known| known.title);
    let mut file = File(String::new());
    file.prose(&format!("caisson's configuration for {title}. Written from the types that read it."));
    file.0.push_str("#\n");
    file.prose(INTRODUCTION);
    file.0.push_str("#\n");
    file.prose(&names(known, hypervisor));
    file.0.push_str(&format!("\n[hypervisor.{hypervisor}]\n"));
    for key in key_doc::common(options) {
        file.key(&key, set(&key, prefix).as_ref());
    }
    let own = key_doc::own(options);
    if !own.is_empty() {
        file.0.push_str(&format!("\n# --- {title} alone ---\n"));
        own.iter().for_each(|key| file.key(key, None));
    }
    file.0.push_str("\n[agent]\n");
    key_doc::agent().iter().for_each(|key| file.key(key, None));
    file.0.push_str("\n[runtime]\n");
    key_doc::runtime().iter().for_each(|key| file.key(key, None));
    file.0
}

const INTRODUCTION: &str = "Lines that begin with \"#key\" (no space) show a key's default; remove the \"#\" to change \
    it. Changes hold for the next sandbox. What differs from host to host is better kept in drop-ins: config.d/*.toml \
    beside this file, and beside the link that names it, laid over it in the order of their names; tables merge, \
    everything else replaces. \"caisson config check\" tells every mistake, \"caisson config show --origin\" what is in \
    force and why.";

/// What a default file sets, since it depends on where caisson is installed.
fn set(key: &KeyDoc, prefix: &Path) -> Option<Value> {
    let file = match key.name.as_str() {
        // The launcher knows which format its hypervisor boots.
        "kernel" => below(prefix, key.default.as_str()?),
        "initrd" => below(prefix, INITRD),
        _ => return None,
    };
    Some(file.display().to_string().into())
}

/// Where a `file` of an installation below `/usr` is in one below `prefix`.
pub fn below(prefix: &Path, file: &str) -> PathBuf {
    prefix.join(file.strip_prefix("/usr/").unwrap_or(file))
}

fn names(known: Option<&Known>, hypervisor: &str) -> String {
    let other = known.and_then(|known| known.synonym);
    let other =
        other.map_or_else(String::new, |synonym| format!(" The table may be called [hypervisor.{synonym}] too."));
    format!(
        "This file's one table [hypervisor.<name>] chooses the hypervisor, unless [runtime] hypervisor does.{other} The \
         launcher caisson-vmm-{hypervisor} has to be installed."
    )
}

/// A file as far as it is written.
struct File(String);

impl File {
    fn prose(&mut self, text: &str) {
        let options = textwrap::Options::new(WIDTH).initial_indent("# ").subsequent_indent("# ");
        let options = options.word_splitter(textwrap::WordSplitter::NoHyphenation);
        self.0.push_str(&textwrap::fill(text, options));
        self.0.push('\n');
    }

    /// Switched on with `value`, or else shown with its default.
    fn key(&mut self, key: &KeyDoc, value: Option<&Value>) {
        self.0.push('\n');
        self.prose(&key.meaning);
        self.prose(&format!("Takes {}; default {}.", key.accepts, key.default));
        match value {
            Some(value) => self.0.push_str(&format!("{} = {value}\n", key.name)),
            None => self.0.push_str(&format!("#{} = {}\n", key.name, key.default)),
        }
    }
}
