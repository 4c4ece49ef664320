//! Debian's compiled kernel package, as it is: nothing is installed, only unpacked.

use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::{self, Package};
use crate::bzimage;
use crate::cache::{Cache, Entry};
use crate::error::{Error, Result};
use crate::manifest::Section;
use crate::modules::ModuleTree;
use crate::progress::Progress;
use crate::recipe::Kernel;

use super::{BZIMAGE, CONFIG, MODULE_ORDER, VMLINUX, write};

/// Metapackages (`linux-image-cloud-amd64`) depend on one package of this kind.
const IMAGE_PREFIX: &str = "linux-image-";

/// Builds the kernel, or finds it in the cache.
pub fn build(cache: &Cache, recipe: &Kernel, progress: &Progress) -> Result<Entry> {
    let package = apt::resolve(apt::find(recipe.package(), recipe.version.as_deref())?, IMAGE_PREFIX)?;
    let section = Section::default()
        .input(&package.name, Some(&package.version), &package.sha256)
        .option("flavour", "debian-binary")
        .option("modules", recipe.modules.join(" "));
    cache.entry("kernel", section, |directory, section| {
        let unpacked = cache.temporary()?;
        unpack(cache, &package, unpacked.path(), progress)?;
        progress.step("taking the kernel and its modules out of the package");
        let release = the_only_entry(&unpacked.path().join("lib/modules"))?;
        let image = read(&unpacked.path().join(format!("boot/vmlinuz-{release}")))?;
        write(directory, VMLINUX, &bzimage::extract_vmlinux(&format!("vmlinuz-{release}"), &image)?)?;
        write(directory, BZIMAGE, &image)?;
        write(directory, CONFIG, &read(&unpacked.path().join(format!("boot/config-{release}")))?)?;
        let tree = ModuleTree::open(&unpacked.path().join("lib/modules").join(&release))?;
        let mut order = String::new();
        for module in tree.select(&recipe.modules)? {
            let name = format!("{}.ko", module.name);
            write(directory, &name, &module.content)?;
            order.push_str(&name);
            order.push('\n');
        }
        write(directory, MODULE_ORDER, order.as_bytes())?;
        section.note("release", release);
        Ok(())
    })
}

fn unpack(cache: &Cache, package: &Package, into: &Path, progress: &Progress) -> Result<()> {
    progress.step(format!("fetching {} {}", package.name, package.version));
    let file = apt::download(cache, package)?;
    progress.step(format!("unpacking {} {}", package.name, package.version));
    apt::unpack(&file, into)
}

/// The kernel's release: the one directory under `lib/modules`.
fn the_only_entry(directory: &Path) -> Result<String> {
    let entries = fs::read_dir(directory).map_err(Error::file("read", directory))?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let only: Option<PathBuf> = paths.next().filter(|_| paths.next().is_none());
    only.and_then(|path| path.file_name()?.to_str().map(str::to_owned))
        .ok_or_else(|| Error::malformed("the kernel package", "it does not hold exactly one kernel"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::file("read", path))
}
