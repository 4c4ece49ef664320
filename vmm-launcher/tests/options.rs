//! What launchers tell of their options is what the shipped configurations were written from.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Set, the checked-in files are written instead of compared.
const BLESS: &str = "CAISSON_BLESS";

/// The launchers that this package builds, with the files that hold their options.
fn launchers() -> Vec<(PathBuf, PathBuf)> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = Path::new(env!("CARGO_BIN_EXE_caisson-vmm-qemu")).parent().unwrap();
    let names = fs::read_dir(source.join("src/bin")).unwrap().map(|entry| entry.unwrap().path());
    names
        .map(|path| {
            let program = path.file_stem().unwrap().to_str().unwrap();
            let hypervisor = program.strip_prefix("caisson-vmm-").unwrap();
            let told = format!("../config-service/defaults/options/{hypervisor}.json");
            (built.join(program), source.join(told))
        })
        .collect()
}

#[test]
fn what_launchers_tell_is_checked_in() {
    let launchers = launchers();
    assert!(!launchers.is_empty());
    for (program, file) in launchers {
        let output = Command::new(&program).arg("options").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let told = String::from_utf8(output.stdout).unwrap();
        if env::var_os(BLESS).is_some() {
            fs::write(&file, &told).unwrap();
        }
        let there = fs::read_to_string(&file).unwrap_or_default();
        let file = file.display();
        assert!(there == told, "{file} is not what {} tells; run this test with {BLESS}=1", program.display());
    }
}
