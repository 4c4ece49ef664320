//! The recipe: what to build, as TOML with defaults for everything (`recipe.toml` documents the keys). Checked here once; the rest of the crate trusts it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What to build. Every table and key may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// The guest kernel.
    pub kernel: Kernel,
    /// The initial RAM disk.
    pub initrd: Initrd,
    /// The root filesystem image.
    pub rootfs: Rootfs,
}

/// The guest kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kernel {
    /// Where the kernel comes from.
    pub flavour: KernelFlavour,
    /// Debian package; by default `linux-source-6.1`, for `debian-binary` `linux-image-cloud-amd64`.
    pub package: Option<String>,
    /// Version of the package; by default the newest that apt's lists offer.
    pub version: Option<String>,
    /// Modules that the guest loads at boot (those that they depend on are added), for `debian-binary`.
    pub modules: Vec<String>,
}

/// Where the kernel comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelFlavour {
    /// Debian's source package with our small configuration, nothing modular.
    #[default]
    DebianSource,
    /// Debian's compiled package, with modules.
    DebianBinary,
}

/// The initial RAM disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Initrd {
    /// How the archive is compressed.
    pub compression: Compression,
}

/// How the initrd is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all: the guest pays nothing to unpack it.
    #[default]
    None,
    /// Smaller on disk, slower to boot, most of all under emulation.
    Zstd,
}

/// The root filesystem image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rootfs {
    /// What is in it.
    pub flavour: RootfsFlavour,
    /// Debian packages on top of `minbase` (and of the test host's own), for `debian` and `test-host`.
    pub packages: Vec<String>,
    /// Debian release, for `debian` and `test-host`.
    pub suite: String,
    /// Debian mirror, for `debian` and `test-host`; by default Debian's own, with its updates and security fixes.
    pub mirror: Option<String>,
    /// Filesystem.
    pub format: Format,
    /// Whether a dm-verity hash tree is appended.
    pub verity: bool,
}

/// What is in the root filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RootfsFlavour {
    /// The agent and the kernel's modules.
    #[default]
    Minimal,
    /// A small Debian system with the agent as its init.
    Debian,
    /// A Debian system to run and test hypervisors and containerd in. Neither agent nor modules are in it: its initrd
    /// has them.
    TestHost,
}

/// Filesystem of the root image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Read-only, small.
    #[default]
    Erofs,
    /// Writable.
    Ext4,
}

/// Boot modules of a guest: its devices, the filesystems that images arrive on, and what guards them.
pub const DEFAULT_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "overlay",
    "erofs",
    "ext4",
    "dm_verity",
];

impl Default for Kernel {
    fn default() -> Self {
        Self {
            flavour: KernelFlavour::default(),
            package: None,
            version: None,
            modules: DEFAULT_MODULES.iter().map(|name| (*name).to_owned()).collect(),
        }
    }
}

impl Kernel {
    /// The Debian package to take.
    pub fn package(&self) -> &str {
        match (&self.package, self.flavour) {
            (Some(package), _) => package,
            (None, KernelFlavour::DebianBinary) => "linux-image-cloud-amd64",
            (None, KernelFlavour::DebianSource) => "linux-source-6.1",
        }
    }
}

impl Default for Rootfs {
    fn default() -> Self {
        Self {
            flavour: RootfsFlavour::default(),
            packages: Vec::new(),
            suite: "bookworm".to_owned(),
            mirror: None,
            format: Format::default(),
            verity: false,
        }
    }
}

impl Recipe {
    /// Reads and checks a recipe file.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::file("read", path))?;
        Self::parse(path, &text)
    }

    /// Checks a recipe's text; `path` is for messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let wrong = |message: String| Error::Recipe { path: path.to_owned(), message };
        let recipe: Self = toml::from_str(text).map_err(|error| wrong(one_line(text, &error)))?;
        recipe.check().map_err(wrong)?;
        Ok(recipe)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let names = self.kernel.package.iter().map(|name| ("kernel.package", name));
        let names = names.chain(self.rootfs.packages.iter().map(|name| ("rootfs.packages", name)));
        for (key, name) in names {
            if !is_package_name(name) {
                return Err(format!(
                    "key `{key}`: `{name}` is not a Debian package name (lower-case letters, digits, `+`, `-`, `.`)"
                ));
            }
        }
        if let Some(version) = self.kernel.version.as_deref().filter(|version| !is_version(version)) {
            return Err(format!("key `kernel.version`: `{version}` is not a Debian version, such as `6.1.170-3`"));
        }
        if let Some(name) = self.kernel.modules.iter().find(|name| !is_module_name(name)) {
            return Err(format!("key `kernel.modules`: `{name}` is not a module name, such as `virtio_blk`"));
        }
        if self.kernel.flavour == KernelFlavour::DebianSource && self.kernel.modules != DEFAULT_MODULES {
            return Err("key `kernel.modules` needs `flavour = \"debian-binary\"` under [kernel]".to_owned());
        }
        if self.rootfs.flavour == RootfsFlavour::Minimal && !self.rootfs.packages.is_empty() {
            return Err(
                "key `rootfs.packages` needs `flavour = \"debian\"` or `flavour = \"test-host\"` under [rootfs]"
                    .to_owned(),
            );
        }
        if !is_package_name(&self.rootfs.suite) {
            return Err(format!(
                "key `rootfs.suite`: `{}` is not a Debian release, such as `bookworm`",
                self.rootfs.suite
            ));
        }
        if let Some(mirror) = self.rootfs.mirror.as_deref().filter(|mirror| !is_address(mirror)) {
            return Err(format!("key `rootfs.mirror`: `{mirror}` is not an http, https or file address"));
        }
        Ok(())
    }
}

/// Debian policy §5.6.1.
fn is_package_name(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
}

/// Debian policy §5.6.12, without the finer points.
fn is_version(version: &str) -> bool {
    version.starts_with(|first: char| first.is_ascii_digit())
        && version.chars().all(|c| c.is_ascii_alphanumeric() || ".+-~:".contains(c))
}

fn is_address(address: &str) -> bool {
    ["http://", "https://", "file:/"].iter().any(|scheme| address.starts_with(scheme))
        && !address.contains(char::is_whitespace)
}

fn is_module_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

/// `line 3, key …: unknown field …, expected …` from toml's several lines.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().lines().collect::<Vec<_>>().join("; ");
    match error.span() {
        Some(span) => {
            let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
            format!("line {line}: {message}")
        }
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> std::result::Result<Recipe, String> {
        Recipe::parse(Path::new("guest.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_recipe_is_the_default() {
        assert_eq!(parse("").unwrap(), Recipe::default());
    }

    #[test]
    fn the_documented_recipe_is_the_default() {
        assert_eq!(parse(include_str!("../recipe.toml")).unwrap(), Recipe::default());
    }

    #[test]
    fn an_unknown_key_names_file_line_key_and_what_is_accepted() {
        let error = parse("[kernel]\nflavor = \"debian-binary\"\n").unwrap_err();
        assert_eq!(
            error,
            "guest.toml: line 2: unknown field `flavor`, expected one of `flavour`, `package`, `version`, `modules`"
        );
    }

    #[test]
    fn an_unknown_value_names_the_accepted_ones() {
        let error = parse("[rootfs]\nformat = \"xfs\"\n").unwrap_err();
        assert_eq!(error, "guest.toml: line 2: unknown variant `xfs`, expected `erofs` or `ext4`");
    }

    #[test]
    fn modules_of_a_kernel_that_has_none_are_refused() {
        let error = parse("[kernel]\nmodules = [\"kvm_amd\"]").unwrap_err();
        assert!(error.ends_with("key `kernel.modules` needs `flavour = \"debian-binary\"` under [kernel]"), "{error}");
        assert!(parse("[kernel]\nflavour = \"debian-binary\"\nmodules = [\"kvm_amd\"]").is_ok());
    }

    #[test]
    fn packages_of_a_minimal_rootfs_are_refused() {
        assert!(parse("[rootfs]\npackages = [\"curl\"]").unwrap_err().contains("needs `flavour = \"debian\"`"));
    }

    #[test]
    fn a_test_host_may_have_more_packages() {
        let recipe = parse("[rootfs]\nflavour = \"test-host\"\npackages = [\"gdb\"]\nsuite = \"sid\"").unwrap();
        assert_eq!(recipe.rootfs.flavour, RootfsFlavour::TestHost);
    }

    #[test]
    fn a_package_name_that_looks_like_an_option_is_refused() {
        let error = parse("[kernel]\npackage = \"--help\"").unwrap_err();
        assert!(error.contains("kernel.package") && error.contains("not a Debian package name"), "{error}");
    }
}
