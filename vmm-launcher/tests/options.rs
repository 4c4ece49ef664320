//! What launchers tell of their options is what the shipped configurations were written from.

mod told;

use std::{fs, path::Path};

#[test]
fn what_launchers_tell_is_checked_in() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = Path::new(env!("CARGO_BIN_EXE_caisson-vmm-qemu")).parent().unwrap();
    let launchers: Vec<_> = fs::read_dir(package.join("src/bin")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!launchers.is_empty());
    for launcher in launchers {
        let program = launcher.file_stem().unwrap().to_str().unwrap();
        told::compare(&built.join(program), program.strip_prefix("caisson-vmm-").unwrap(), package.parent().unwrap());
    }
}
