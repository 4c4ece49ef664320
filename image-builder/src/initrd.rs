//! The initrd: the agent as `/init`, the kernel's modules, and the order to load them in. The guest runs from it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::agent::Agent;
use crate::cache::{Cache, Entry};
use crate::error::{Error, Result};
use crate::kernel;
use crate::manifest::Section;
use crate::recipe::{Compression, Initrd};
use crate::tree::{Content, Tree};

/// File name of the initrd.
pub const FILE: &str = "initrd.img";

/// One absolute path of a module a line, in the order to load them; the agent reads it at boot.
pub const ORDER: &str = "lib/modules/order";

/// zstd's level for `compression = "zstd"`: most of level 19's size in a tenth of its time.
const ZSTD_LEVEL: i32 = 12;

/// Builds the initrd, or finds it in the cache.
pub fn build(cache: &Cache, recipe: &Initrd, kernel: &Entry, agent: &Agent) -> Result<Entry> {
    let compression = match recipe.compression {
        Compression::None => "none",
        Compression::Zstd => "zstd",
    };
    let section = kernel::module_inputs(kernel, Section::default().input("agent", None, &agent.sha256))
        .option("compression", compression);
    cache.entry("initrd", section, |directory, _| {
        let mut tree = base();
        add_modules(&mut tree, kernel)?;
        tree.file("init", 0o755, Content::Copy(agent.path.clone()));
        write(&tree, recipe.compression, &directory.join(FILE))
    })
}

/// What every guest root has: mount points, and the console that the kernel opens for the first process.
pub fn base() -> Tree {
    let mut tree = Tree::default();
    for name in ["dev", "etc", "proc", "run", "sys"] {
        tree.directory(name, 0o755);
    }
    tree.directory("tmp", 0o1777);
    tree.char_device("dev/console", 0o600, 5, 1);
    tree
}

/// Adds the kernel's modules and their load order, if it has any.
pub fn add_modules(tree: &mut Tree, kernel: &Entry) -> Result<()> {
    let mut order = String::new();
    for name in kernel::modules(kernel)? {
        let path = format!("lib/modules/{name}");
        order.push_str(&format!("/{path}\n"));
        tree.file(&path, 0o644, Content::Copy(kernel.path(&name)));
    }
    if !order.is_empty() {
        tree.file(ORDER, 0o644, Content::Bytes(order.into_bytes()));
    }
    Ok(())
}

fn write(tree: &Tree, compression: Compression, path: &Path) -> Result<()> {
    let file = BufWriter::new(File::create(path).map_err(Error::file("create", path))?);
    let mut file = match compression {
        Compression::None => tree.write_cpio(file)?,
        Compression::Zstd => {
            let encoder = zstd::Encoder::new(file, ZSTD_LEVEL).map_err(Error::file("compress", path))?;
            tree.write_cpio(encoder)?.finish().map_err(Error::file("compress", path))?
        }
    };
    file.flush().map_err(Error::file("write", path))
}
