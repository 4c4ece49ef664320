//! The guest kernel as a cache entry: `vmlinux` (entered directly by most VMMs), `bzImage` (what every boot loader
//! takes), its configuration, and the modules that the guest loads.

pub mod binary;
pub mod source;

use std::fs;
use std::path::Path;

use crate::cache::{Cache, Entry};
use crate::error::{Error, Result};
use crate::manifest::Section;
use crate::progress::Progress;
use crate::recipe::{Kernel, KernelFlavour};

/// The uncompressed kernel, an ELF file with a PVH entry.
pub const VMLINUX: &str = "vmlinux";
/// The compressed kernel with its boot header.
pub const BZIMAGE: &str = "bzImage";
/// The kernel's configuration.
pub const CONFIG: &str = "kernel.config";
/// File names of the modules, in the order to load them.
const MODULE_ORDER: &str = "modules.order";

/// Builds the kernel, or finds it in the cache.
pub fn build(cache: &Cache, recipe: &Kernel, progress: &Progress) -> Result<Entry> {
    match recipe.flavour {
        KernelFlavour::DebianBinary => binary::build(cache, recipe, progress),
        KernelFlavour::DebianSource => source::build(cache, recipe, progress),
    }
}

/// File names of a kernel's modules, in the order to load them; empty when everything is built in.
pub fn modules(kernel: &Entry) -> Result<Vec<String>> {
    let order = kernel.path(MODULE_ORDER);
    let names = fs::read_to_string(&order).map_err(Error::file("read", &order))?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Names the kernel's modules, and their order, as inputs of what is built with them.
pub fn module_inputs(kernel: &Entry, section: Section) -> Section {
    let outputs = kernel.section.outputs.iter();
    let modules = outputs.filter(|artifact| artifact.name.ends_with(".ko") || artifact.name == MODULE_ORDER);
    modules.fold(section, |section, module| section.input(&module.name, None, &module.sha256))
}

/// Whether an output is for the user, and not only for later steps.
pub fn is_published(name: &str) -> bool {
    [VMLINUX, BZIMAGE, CONFIG].contains(&name)
}

fn write(directory: &Path, name: &str, content: &[u8]) -> Result<()> {
    let path = directory.join(name);
    fs::write(&path, content).map_err(Error::file("write", &path))
}
