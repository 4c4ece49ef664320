//! Debian packages: which version apt offers, and the package file, checked against the signed lists' digest.

use std::path::{Path, PathBuf};

use crate::cache::{Cache, Entry};
use crate::digest;
use crate::error::{Error, Result};
use crate::manifest::Section;
use crate::tool::Tool;

/// apt's own downloader, for files that are no packages.
const HELPER: &str = "/usr/lib/apt/apt-helper";

/// One version of a package in apt's lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Package name.
    pub name: String,
    /// Debian version.
    pub version: String,
    /// Digest of the package file, from the signed lists.
    pub sha256: String,
    /// Its `Depends` field.
    pub depends: String,
}

/// Finds a package in apt's lists: the given version, or the newest.
pub fn find(name: &str, version: Option<&str>) -> Result<Package> {
    let shown = match Tool::new("apt-cache", "look up Debian packages").args(["show", "--", name]).run() {
        Ok(shown) => shown,
        // apt-cache ends with 100 and "No packages found".
        Err(Error::Tool { .. }) => return Err(Error::NoPackage { package: name.to_owned() }),
        Err(error) => return Err(error),
    };
    let packages: Vec<Package> = shown.split("\n\n").filter_map(parse).filter(|package| package.name == name).collect();
    let Some(newest) = packages.first() else {
        return Err(Error::NoPackage { package: name.to_owned() });
    };
    let Some(version) = version else {
        return Ok(newest.clone());
    };
    packages.iter().find(|package| package.version == version).cloned().ok_or_else(|| Error::NoVersion {
        package: name.to_owned(),
        version: version.to_owned(),
        available: packages.iter().map(|package| package.version.as_str()).collect::<Vec<_>>().join(", "),
    })
}

/// Follows a metapackage to the package that it stands for: the one dependency whose name starts with `prefix`.
pub fn resolve(package: Package, prefix: &str) -> Result<Package> {
    let dependency = package.depends.split(',').map(str::trim).find(|dependency| dependency.starts_with(prefix));
    let Some(dependency) = dependency else { return Ok(package) };
    let mut words = dependency.split(|c: char| c.is_whitespace() || "(=)".contains(c)).filter(|word| !word.is_empty());
    let name = words.next().unwrap_or_default();
    find(name, dependency.contains("(=").then(|| words.next()).flatten())
}

/// Downloads a package file into the cache, and checks its digest.
pub fn download(cache: &Cache, package: &Package) -> Result<PathBuf> {
    let section = Section::default().input(&package.name, Some(&package.version), &package.sha256);
    let Entry { directory, .. } = cache.entry("package", section, |directory, _| {
        let wanted = format!("{}={}", package.name, package.version);
        Tool::new("apt-get", format!("download the Debian package {wanted}"))
            // apt's own user cannot write to our directory; root may.
            .args(["download", "--quiet=2", "-o", "APT::Sandbox::User=root", "--", &wanted])
            .current_dir(directory)
            .run()?;
        let file = the_deb(directory)?;
        let found = digest::of_file(&file)?;
        if found != package.sha256 {
            return Err(Error::DamagedPackage { package: wanted, found, expected: package.sha256.clone() });
        }
        Ok(())
    })?;
    the_deb(&directory)
}

/// Downloads a file of a Debian archive, such as a signed index.
pub fn fetch(address: &str, file: &Path) -> Result<()> {
    Tool::new(HELPER, format!("download {address}"))
        .args(["-o", "APT::Sandbox::User=root", "download-file", address])
        .arg(file)
        .run()
        .map(drop)
}

/// Unpacks a package file, without running its scripts.
pub fn unpack(file: &Path, into: &Path) -> Result<()> {
    Tool::new("dpkg-deb", format!("unpack {}", file.display())).arg("--extract").arg(file).arg(into).run().map(drop)
}

fn the_deb(directory: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory).map_err(Error::file("read", directory))?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| Error::malformed(directory.display().to_string(), "apt-get download left no package file"))
}

/// One paragraph of `apt-cache show`.
fn parse(paragraph: &str) -> Option<Package> {
    let field = |name: &str| {
        paragraph.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.trim().to_owned()))
    };
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        sha256: field("SHA256")?,
        depends: field("Depends").unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paragraph_is_read_field_by_field() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.1-1\nDepends: linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1)\nDescription: x\n more: y\nSHA256: 00ff\n";
        let package = parse(text).unwrap();
        assert_eq!((package.version.as_str(), package.sha256.as_str()), ("6.1.1-1", "00ff"));
        assert_eq!(package.depends, "linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1)");
    }

    #[test]
    fn a_paragraph_without_a_digest_is_skipped() {
        assert_eq!(parse("Package: local\nVersion: 1\nStatus: install ok installed\n"), None);
    }

    #[test]
    fn an_unknown_package_is_named_with_the_remedy() {
        let error = find("no-such-package-as-this", None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no Debian package no-such-package-as-this; check the name, or run: apt-get update"
        );
    }
}
