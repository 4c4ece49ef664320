//! The command as a user meets it: an installation in a folder of its own, with a launcher that is a script.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

const LAUNCHER: &str = r#"#!/bin/sh
case $1 in
--version) echo caisson-vmm-qemu 0.1.0 ;;
options) echo '[{"key":"machine_type","type":"string","default":"q35","accepted":["q35","microvm"],"doc":"The machine."}]' ;;
capabilities) cat <<END ;;
{"version": "QEMU emulator version 9.9.9 (Debian)", "accelerator": "tcg", "accelerator_reason": "there is no KVM",
 "devices": ["block", "fs"], "hotplug": ["block"], "operations": ["snapshot"], "missing": {"net-hotplug": "the machine has no slots"},
 "hypervisor_path": "$4"}
END
esac
"#;
const BROKEN_LAUNCHER: &str =
    "#!/bin/sh\necho 'caisson-vmm-firecracker: execute /usr/bin/firecracker: no such file' >&2\nexit 1\n";
const PROGRAM: &str = "#!/bin/sh\necho program 0.1.0\n";

/// `bin` with the command and what belongs to it, and a configuration.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(host.path("bin")).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_caisson"), host.path("bin/caisson")).unwrap();
        host.program("caisson-vmm-qemu", LAUNCHER);
        for name in ["containerd-shim-caisson-v2", "caisson-config-service", "virtiofsd", "qemu"] {
            host.program(name, PROGRAM);
        }
        for name in ["kernel", "initrd"] {
            fs::write(host.path(name), name).unwrap();
        }
        host.configure("configuration.toml", "");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A good configuration for QEMU, with `more` in its table.
    fn configure(&self, name: &str, more: &str) -> PathBuf {
        let file = |name: &str| self.path(name).display().to_string();
        let text = format!(
            "[hypervisor.qemu]\npath = \"{}\"\nkernel = \"{}\"\ninitrd = \"{}\"\nvirtio_fs_daemon = \"{}\"\n{more}",
            file("bin/qemu"),
            file("kernel"),
            file("initrd"),
            file("bin/virtiofsd")
        );
        fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(self.path("bin/caisson"));
        command.env("CAISSON_CONF_FILE", self.path("configuration.toml")).env("CAISSON_RUN_DIR", self.path("run"));
        command.args(arguments).output().unwrap()
    }

    fn ask(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_slice(&self.run(&[arguments, &["--json"]].concat()).stdout).unwrap()
    }

    /// What is said when it fails, in one sentence.
    fn refusal(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
        told
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_hypervisor_in_force_is_found_as_kata_containers_users_find_it() {
    let host = Host::new();
    let line = format!("{} env | awk -v RS= '/\\[Hypervisor\\]/' | grep ^Path", text(&host.path("bin/caisson")));
    let output = Command::new("sh")
        .args(["-c", &line])
        .env("CAISSON_CONF_FILE", host.path("configuration.toml"))
        .output()
        .unwrap();
    let expected = format!("Path = \"{}\"\n", text(&host.path("bin/qemu")));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

#[test]
fn the_environment_has_versions_and_digests() {
    let told = Host::new().json(&["env"]);
    assert_eq!(told["Hypervisor"]["Version"], "QEMU emulator version 9.9.9 (Debian)");
    assert_eq!(told["SharedFs"]["Version"], "program 0.1.0");
    // printf kernel | sha256sum
    assert_eq!(told["Kernel"]["Sha256"], "6923dd1bc0460082c5d55a831908c24a282860b7f1cd6c2b79cf1bc8857c639c");
    assert_eq!(told["Programs"][0]["Name"], "containerd-shim-caisson-v2");
}

#[test]
fn a_check_names_every_problem_of_the_configuration_with_a_remedy_and_fails() {
    let host = Host::new();
    host.configure("configuration.toml", "kernle = 1\ndefault_memory = -5\n");
    assert_eq!(host.run(&["check"]).status.code(), Some(1));
    let found = host.json(&["check"]);
    let of = |subject: &str| {
        let findings = found.as_array().unwrap().iter();
        findings.filter(|finding| finding["subject"] == subject).cloned().collect::<Vec<_>>()
    };
    let problems = of("configuration");
    assert_eq!(problems.len(), 2, "{found:#}");
    assert!(problems.iter().all(|problem| problem["verdict"] == "fail" && problem["remedy"].is_string()));
    assert_eq!(of("KVM").len(), 1);
}

#[test]
fn a_check_of_a_good_configuration_passes_its_part() {
    let found = Host::new().json(&["check"]);
    for subject in ["configuration", "hypervisor", "kernel", "initrd", "virtiofsd", "config-service", "shim"] {
        let finding = found.as_array().unwrap().iter().find(|finding| finding["subject"] == subject);
        assert_eq!(finding.map(|finding| &finding["verdict"]), Some(&"pass".into()), "{subject}: {found:#}");
    }
}

#[test]
fn the_list_of_hypervisors_tells_what_works_and_why_not() {
    let host = Host::new();
    host.program("caisson-vmm-firecracker", BROKEN_LAUNCHER);
    host.program("caisson-vmm-other", LAUNCHER);
    let list = host.ask(&["hypervisor", "list"]);
    let line = |name: &str| {
        let line = list.lines().find(|line| line.split_whitespace().any(|word| word == name)).unwrap();
        line.split_whitespace().collect::<Vec<_>>()
    };
    let program = host.path("bin/qemu");
    assert_eq!(line("*")[..6], ["*", "qemu", "qemu", text(&program), "9.9.9", "tcg"]);
    assert_eq!(line("*")[line("*").len() - 10..], ["yes", "yes", "no", "no", "no", "yes", "no", "no", "no", "no"]);
    for sentence in [
        "qemu: no network hotplug: the machine has no slots",
        "qemu: no VFIO and GPUs, TDX, SEV-SNP: needs KVM; there is no KVM",
        "firecracker: execute /usr/bin/firecracker: no such file",
        "acrn: not installed: there is no caisson-vmm-acrn",
    ] {
        assert!(list.lines().any(|line| line.trim() == sentence), "no \"{sentence}\" in:\n{list}");
    }
    let json = host.json(&["hypervisor", "list"]);
    assert_eq!(json.as_array().unwrap().len(), 7, "{json:#}");
    assert_eq!(json[6]["name"], "other");
    assert_eq!(json[1]["program"], text(&program));
}

#[test]
fn a_hypervisor_is_shown_with_its_program_and_its_own_keys() {
    let host = Host::new();
    let shown = host.ask(&["hypervisor", "show", "qemu"]);
    let program = format!("\nprogram          {}\n", host.path("bin/qemu").display());
    let keys = "machine_type  \"q35\"    The machine.";
    for part in ["QEMU emulator version 9.9.9", "tcg (there is no KVM)", "\nin force         yes\n", &program, keys] {
        assert!(shown.contains(part), "no \"{part}\" in:\n{shown}");
    }
    assert_eq!(host.json(&["hypervisor", "show", "qemu"])["program"], text(&host.path("bin/qemu")));
}

/// A launcher that finds only what it is told of, and tells of its options.
const PARTICULAR: &str = r#"#!/bin/sh
case $1 in
options) echo '[{"key":"slots","type":"integer","default":0}]' ;;
capabilities)
    [ -e "$4" ] || { echo "caisson-vmm-firecracker: execute /usr/bin/firecracker: no such file" >&2; exit 1; }
    case $6 in 'slots = 3'*) hotplug='"block"' ;; esac
    echo "{\"version\": \"1\", \"accelerator\": \"kvm\", \"accelerator_reason\": \"\", \"devices\": [\"fs\"], \
        \"hotplug\": [$hotplug], \"operations\": [], \"hypervisor_path\": \"$4\"}" ;;
esac
"#;

#[test]
fn a_hypervisor_is_asked_as_its_own_configuration_has_it() {
    let host = Host::new();
    host.program("caisson-vmm-firecracker", PARTICULAR);
    let qemu = fs::read_to_string(host.path("configuration.toml")).unwrap();
    // Also when something else is wrong with it.
    let own = qemu.replace("[hypervisor.qemu]", "[hypervisor.fc]\nslots = 3\nkernle = 1");
    fs::write(host.path("configuration-fc.toml"), own).unwrap();
    let list = host.json(&["hypervisor", "list"]);
    let line = list.as_array().unwrap().iter().find(|line| line["name"] == "firecracker").unwrap();
    let expected = (&"yes".into(), &text(&host.path("bin/qemu")).into());
    assert_eq!((&line["features"]["block_hotplug"], &line["program"]), expected, "{line:#}");
    let shown = host.json(&["hypervisor", "show", "fc"]);
    assert_eq!(shown["program"], text(&host.path("bin/qemu")), "{shown:#}");
    assert_eq!(shown["capabilities"]["hotplug"][0], "block", "{shown:#}");
    assert_eq!(shown["in_force"], false);
}

#[test]
fn a_configuration_in_force_that_cannot_be_used_is_told_with_its_hypervisor() {
    let host = Host::new();
    host.configure("configuration.toml", "kernle = 1\n");
    let list = host.ask(&["hypervisor", "list"]);
    assert!(list.lines().any(|line| line.starts_with("*  qemu")), "{list}");
    let sentence = "qemu: its configuration cannot be used: ";
    assert!(list.lines().any(|line| line.trim().starts_with(sentence) && line.contains("unknown key")), "{list}");
    let line = &host.json(&["hypervisor", "list"])[1];
    assert_eq!((&line["in_force"], line["problems"].as_array().map(Vec::len)), (&true.into(), Some(1)), "{line:#}");
    assert!(host.ask(&["hypervisor", "show", "qemu"]).contains("cannot be used"));
}

#[test]
fn a_configuration_in_force_that_names_no_hypervisor_is_told() {
    let host = Host::new();
    fs::write(host.path("configuration.toml"), "[hypervisor.qemu\n").unwrap();
    let output = host.run(&["hypervisor", "list", "--json"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.starts_with("caisson: no hypervisor is in force: the configuration "), "{told}");
    assert!(serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap().is_array());
}

#[test]
fn a_check_looks_for_what_root_file_systems_on_disks_take() {
    let host = Host::new();
    host.configure("configuration.toml", "rootfs = \"block\"\nrootfs_writable = \"disk\"\n");
    let found = host.json(&["check"]);
    for subject in ["mkfs.erofs", "mkfs.ext4", "layer cache"] {
        assert!(found.as_array().unwrap().iter().any(|finding| finding["subject"] == subject), "{subject}: {found:#}");
    }
}

#[test]
fn another_hypervisor_is_used_checked_and_taken_back() {
    let host = Host::new();
    fs::rename(host.path("configuration.toml"), host.path("configuration-one.toml")).unwrap();
    symlink("configuration-one.toml", host.path("configuration.toml")).unwrap();
    let two = host.configure("configuration-qemu.toml", "default_vcpus = 2\n");
    let shown = || host.ask(&["config", "show"]);

    assert!(host.ask(&["hypervisor", "use", "qemu"]).starts_with("new sandboxes use "));
    assert!(shown().contains("default_vcpus = 2"), "{}", shown());
    host.ask(&["hypervisor", "use", "--previous"]);
    assert!(shown().contains("default_vcpus = 1"), "{}", shown());

    let refused = host.refusal(&["hypervisor", "use", "fc", "--config", text(&two)]);
    assert_eq!(refused, format!("caisson: {} is for qemu, not for firecracker\n", two.display()));
    let refused = host.refusal(&["hypervisor", "use", "quemu"]);
    assert!(refused.contains("did you mean") && refused.contains("qemu"), "{refused}");
    assert!(shown().contains("default_vcpus = 1"));
}

#[test]
fn a_configuration_is_checked_and_shown_with_the_origin_of_its_values() {
    let host = Host::new();
    let good = host.configure("good.toml", "default_vcpus = 3\n");
    let bad = host.configure("bad.toml", "kernle = 1\n");
    let output = host.run(&["config", "check", text(&good), text(&bad)]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.starts_with(&format!("{}: good\n{}:6:1: ", good.display(), bad.display())), "{told}");
    assert!(told.ends_with("bad.toml: 1 problem; it cannot be used\n"), "{told}");
    let shown = host.ask(&["config", "show", "--origin", text(&good)]);
    assert!(shown.contains(&format!("default_vcpus = 3  # {}:6", good.display())), "{shown}");
    assert!(shown.contains("default_memory = 256  # default"), "{shown}");
}

#[test]
fn a_file_of_kata_containers_becomes_one_of_ours_and_is_never_written_over_another() {
    let host = Host::new();
    let kata = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kata/go/qemu.toml");
    let output = host.path("imported.toml");
    let report = host.ask(&["config", "import", text(&kata), "--output", text(&output)]);
    assert!(
        report.contains("runtime.create_container_timeout = 60  ->  runtime.request_timeout_ms = 60000"),
        "{report}"
    );
    assert!(report.contains("to mend before it can be used here:"), "{report}");
    assert!(fs::read_to_string(&output).unwrap().contains("[hypervisor.qemu]"));
    let refused = host.refusal(&["config", "import", text(&kata), "--output", text(&output)]);
    assert!(refused.contains("exists: move it away first"), "{refused}");
    let printed = host.ask(&["config", "import", text(&kata)]);
    assert_eq!(printed, fs::read_to_string(&output).unwrap());
}

#[test]
fn an_imported_configuration_names_the_kernel_that_the_hypervisor_boots() {
    let host = Host::new();
    let options = r#"[{"key":"kernel","default":"/usr/share/caisson/bzImage"}]"#;
    host.program("caisson-vmm-stratovirt", &format!("#!/bin/sh\necho '{options}'\n"));
    let kata = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kata/go/stratovirt.toml");
    let printed = host.ask(&["config", "import", text(&kata)]);
    assert!(
        printed.contains(&format!("\nkernel = \"{}\"\n", host.path("share/caisson/bzImage").display())),
        "{printed}"
    );
}

#[test]
fn a_package_is_installed_twice_without_a_change_and_uninstalled_without_a_rest() {
    let host = Host::new();
    let root = host.path("root");
    let install = ["install", "--prefix", "/usr", "--destdir", text(&root)];
    host.ask(&install);
    for file in [
        "usr/bin/containerd-shim-caisson-v2",
        "usr/share/defaults/caisson/configuration-fc.toml",
        "usr/share/defaults/caisson/configuration.toml",
        "usr/share/caisson/runtime-classes/caisson-clh.yaml",
        "usr/lib/systemd/system/caisson-config-service.socket",
        "usr/share/man/man1/caisson-hypervisor-use.1",
    ] {
        assert!(root.join(file).exists(), "no {file}");
    }
    let again = host.json(&install);
    let files = again["files"].as_array().unwrap();
    assert!(files.iter().all(|file| file["outcome"] == "unchanged"), "{again:#}");

    let mine = root.join("usr/share/defaults/caisson/configuration-qemu.toml");
    fs::write(&mine, "# mine\n").unwrap();
    let told = host.ask(&["uninstall", "--prefix", "/usr", "--destdir", text(&root)]);
    assert!(told.contains("kept      /usr/share/defaults/caisson/configuration-qemu.toml"), "{told}");
    assert_eq!(files_below(&root), [mine]);
    let refused = host.refusal(&["uninstall", "--prefix", "/usr", "--destdir", text(&root)]);
    assert!(refused.starts_with("caisson: caisson is not installed in /usr"), "{refused}");
}

#[test]
fn an_installation_that_cannot_be_registered_leaves_nothing_half_done() {
    let host = Host::new();
    let (config, prefix) = (host.path("containerd.toml"), host.path("prefix"));
    fs::write(&config, "version = 2\nplugins = [\n").unwrap();
    let refused = host.refusal(&["install", "--prefix", text(&prefix), "--containerd-config", text(&config)]);
    let expected =
        format!("caisson: register with containerd in {}: it is no TOML: line 2: unclosed array", config.display());
    assert!(refused.starts_with(&expected), "{refused}");
    assert!(!prefix.exists());
}

#[test]
fn what_an_installation_leaves_out_is_named() {
    let host = Host::new();
    fs::remove_file(host.path("bin/containerd-shim-caisson-v2")).unwrap();
    let refused = host.refusal(&["install", "--destdir", text(&host.path("root"))]);
    assert!(refused.starts_with("caisson: there is no containerd-shim-caisson-v2 in "), "{refused}");
}

#[test]
fn a_host_without_sandboxes_says_so() {
    let host = Host::new();
    assert_eq!(host.ask(&["sandbox", "list", "--json"]), "[]\n");
    assert_eq!(host.refusal(&["sandbox", "inspect", "web"]), "caisson: no sandbox web: none is running\n");
}

#[test]
fn completions_are_those_of_the_shell() {
    let host = Host::new();
    assert!(host.ask(&["completions", "bash"]).contains("complete -F _caisson"));
    assert!(host.ask(&["completions", "fish"]).contains("complete -c caisson"));
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(files_below(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files
}
