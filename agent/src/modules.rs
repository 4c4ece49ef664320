//! Loads the kernel modules that the image names, in its order. No dependency resolution: the image's builder did that.

use std::{fs, fs::File, path::Path};

use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
};
use tracing::{debug, warn};

/// One absolute path of a `.ko` a line; an image without modules has no such file.
pub const ORDER: &str = "/lib/modules/order";

/// Loads every module of the list at `order`. One that fails is told and skipped: what needs it will say so.
pub fn load(order: &Path) {
    let Ok(list) = fs::read_to_string(order) else { return };
    for path in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        match load_one(path) {
            Ok(()) => debug!(path, "module loaded"),
            Err(error) => warn!(path, %error, "module not loaded"),
        }
    }
}

fn load_one(path: &str) -> std::io::Result<()> {
    match finit_module(&File::open(path)?, c"", ModuleInitFlags::empty()) {
        // Loaded before, or built in.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
