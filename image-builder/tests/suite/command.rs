//! The command line: what it prints, and one clear sentence for what goes wrong.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn image_builder(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_image-builder"));
    command.current_dir(directory).env("CAISSON_CACHE", directory.join("cache"));
    command
}

fn error_of(output: &Output) -> String {
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    text.lines()
        .find_map(|line| line.strip_prefix("image-builder: "))
        .unwrap_or_else(|| panic!("no error in {text}"))
        .to_owned()
}

#[test]
fn an_unknown_key_is_refused_before_anything_is_built() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("guest.toml"), "[rootfs]\nformt = \"erofs\"\n").unwrap();
    let output = image_builder(directory.path()).args(["build", "all", "--manifest", "guest.toml"]).output().unwrap();
    assert_eq!(
        error_of(&output),
        "guest.toml: line 2: unknown field `formt`, expected one of `flavour`, `packages`, `suite`, `mirror`, `format`, `verity`"
    );
    assert!(!directory.path().join("cache").exists());
}

#[test]
fn a_missing_recipe_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let output = image_builder(directory.path()).args(["build", "all", "--manifest", "none.toml"]).output().unwrap();
    assert_eq!(error_of(&output), "cannot read none.toml: No such file or directory (os error 2)");
}

#[test]
fn a_dynamic_agent_is_refused_with_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let output = image_builder(directory.path()).args(["build", "initrd", "--agent", "/bin/ls"]).output().unwrap();
    assert!(error_of(&output).contains("is dynamically linked"));
}

#[test]
fn the_agent_of_the_workspace_is_taken_rather_than_one_beside_the_program() {
    let directory = tempfile::tempdir().unwrap();
    let guest = directory.path().join("target/x86_64-unknown-linux-gnu/guest");
    fs::create_dir_all(&guest).unwrap();
    fs::write(directory.path().join("Cargo.lock"), "").unwrap();
    fs::write(guest.join("caisson-agent"), "no program").unwrap();
    let program = directory.path().join("image-builder");
    fs::copy(env!("CARGO_BIN_EXE_image-builder"), &program).unwrap();
    fs::copy("/bin/ls", directory.path().join("caisson-agent")).unwrap();
    let mut command = Command::new(program);
    command.current_dir(&directory).env("CAISSON_CACHE", directory.path().join("cache")).args(["build", "initrd"]);
    let error = error_of(&command.output().unwrap());
    assert!(error.contains("guest/caisson-agent") && error.contains("not a 64-bit ELF program"), "{error}");
}

#[test]
fn a_missing_program_is_named_with_its_package() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("guest.toml"), "[kernel]\nflavour = \"debian-binary\"\n").unwrap();
    let mut command = image_builder(directory.path());
    command.env("PATH", "/nonexistent").args(["build", "kernel", "--manifest", "guest.toml"]);
    let output = command.output().unwrap();
    assert_eq!(
        error_of(&output),
        "apt-cache is needed to look up Debian packages and is not installed; run: apt-get install apt"
    );
}

#[test]
fn an_unknown_package_is_named() {
    if !crate::common::has("apt-cache") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("guest.toml"), "[kernel]\npackage = \"linux-image-of-nobody\"\n").unwrap();
    let output =
        image_builder(directory.path()).args(["build", "kernel", "--manifest", "guest.toml"]).output().unwrap();
    assert!(error_of(&output).starts_with("no Debian package linux-image-of-nobody"));
}

#[test]
fn a_version_that_is_not_there_is_answered_with_those_that_are() {
    if !crate::common::has_kernel_package() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("guest.toml"), "[kernel]\nflavour = \"debian-binary\"\nversion = \"1.0\"\n")
        .unwrap();
    let output =
        image_builder(directory.path()).args(["build", "kernel", "--manifest", "guest.toml"]).output().unwrap();
    assert!(
        error_of(&output).contains("no version 1.0 of package linux-image-cloud-amd64 in apt's lists; available: 6.")
    );
}

#[test]
fn a_module_that_the_kernel_has_not_is_named() {
    if !crate::common::has_kernel_package() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(
        directory.path().join("guest.toml"),
        "[kernel]\nflavour = \"debian-binary\"\nmodules = [\"virtio_blq\"]\n",
    )
    .unwrap();
    let output =
        image_builder(directory.path()).args(["build", "kernel", "--manifest", "guest.toml"]).output().unwrap();
    assert!(error_of(&output).contains("has no module virtio_blq"));
}

#[test]
fn a_full_disk_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, [1; 4096]).unwrap();
    std::os::unix::fs::symlink("/dev/full", directory.path().join("image.verity")).unwrap();
    let output = image_builder(directory.path()).args(["verity", "image"]).output().unwrap();
    assert_eq!(error_of(&output), "cannot write image.verity: No space left on device (os error 28)");
}

#[test]
fn verity_prints_the_root_hash() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("image"), [0; 8192]).unwrap();
    let output = image_builder(directory.path()).args(["verity", "image"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let root = text.lines().find_map(|line| line.strip_prefix("root hash")).unwrap().trim();
    assert!(root.len() == 64 && root.chars().all(|c| c.is_ascii_hexdigit()), "{text}");
}
