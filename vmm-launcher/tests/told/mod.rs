//! Compares what a launcher tells of its options with the file that the shipped configurations are written from.

use std::{env, fs, path::Path, process::Command};

/// Set, the checked-in file is written instead of compared.
const BLESS: &str = "CAISSON_BLESS";

/// `workspace` has the checked-in files.
pub fn compare(program: &Path, hypervisor: &str, workspace: &Path) {
    let file = workspace.join(format!("config-service/defaults/options/{hypervisor}.json"));
    let output = Command::new(program).arg("options").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let told = String::from_utf8(output.stdout).unwrap();
    if env::var_os(BLESS).is_some() {
        fs::write(&file, &told).unwrap();
    }
    let there = fs::read_to_string(&file).unwrap_or_default();
    let (file, program) = (file.display(), program.display());
    assert!(there == told, "{file} is not what {program} tells; run this test with {BLESS}=1");
}
