//! Every kind of configuration that Kata Containers has shipped, filled in by hand (`tests/kata`): what becomes of each
//! key stands in `tests/kata/fates.txt`, which `CAISSON_BLESS=1` writes anew.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

use caisson_config_service::keys::{self, Key};

use super::{
    kata,
    report::Report,
    translate::{Fate, KnownKeys, translate},
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kata")
}

fn templates() -> Vec<PathBuf> {
    let kinds = ["go", "rust", "old"].map(|kind| fs::read_dir(folder().join(kind)).unwrap());
    let mut files: Vec<_> = kinds.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The common keys, and some that launchers have.
fn known() -> KnownKeys {
    let names = |keys: &[Key]| keys.iter().map(|key| key.name.to_owned()).collect::<BTreeSet<_>>();
    let mut hypervisor = names(keys::HYPERVISOR);
    hypervisor.extend(
        ["machine_type", "cpu_features", "seccomp_sandbox", "jailer_path", "block_device_driver"].map(str::to_owned),
    );
    let kernel = "/usr/share/caisson/vmlinux".to_owned();
    KnownKeys { hypervisor, agent: names(keys::AGENT), runtime: names(keys::RUNTIME), kernel }
}

fn describe(fate: &Fate) -> String {
    match fate {
        Fate::CarriedOver => "carried over".to_owned(),
        Fate::Renamed { becomes, new_value } => format!("becomes {becomes} = {new_value}"),
        Fate::Off => "off".to_owned(),
        Fate::NoEquivalent { reason } => format!("none: {reason}"),
    }
}

#[test]
fn what_becomes_of_each_key_is_as_it_was_judged() {
    let mut fates = BTreeSet::new();
    for file in templates() {
        let translation = translate(&kata::read(&file).unwrap(), &known(), Path::new("/usr"));
        fates.extend(
            translation
                .entries
                .iter()
                .map(|entry| format!("{} = {}\n    {}\n", entry.key, entry.value, describe(&entry.fate))),
        );
    }
    let (found, expected) = (fates.into_iter().collect::<String>(), folder().join("fates.txt"));
    if env::var_os("CAISSON_BLESS").is_some() {
        fs::write(&expected, &found).unwrap();
    }
    assert_eq!(found, fs::read_to_string(expected).unwrap());
}

#[test]
fn no_key_of_any_template_is_unknown() {
    for file in templates() {
        for entry in translate(&kata::read(&file).unwrap(), &known(), Path::new("/usr")).entries {
            let told = describe(&entry.fate);
            assert!(!told.contains("neither caisson nor"), "{}: {}", file.display(), entry.key);
        }
    }
}

#[test]
fn every_template_becomes_a_configuration_that_can_be_read_with_the_hypervisor_that_it_had() {
    for file in templates() {
        let kata = kata::read(&file).unwrap();
        let translation = translate(&kata, &known(), Path::new("/usr"));
        let table: toml::Table = translation.text.parse().unwrap();
        let tables = table.get("hypervisor").and_then(toml::Value::as_table);
        let chosen = tables.and_then(|tables| tables.keys().next()).map(String::as_str);
        let theirs = kata.hypervisor.as_deref();
        let expected = match theirs {
            Some("clh") => Some("cloud-hypervisor"),
            Some("dragonball") => Some("builtin"),
            Some("remote" | "openvmm") => None,
            other => other,
        };
        assert_eq!(chosen, expected, "{}", file.display());
        assert_eq!(translation.notes.is_empty(), expected.is_some(), "{}", file.display());
    }
}

#[test]
fn the_whole_report_of_a_small_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("configuration.toml");
    let text = "[hypervisor.qemu]\npath = \"/usr/bin/q\"\nimage = \"/k.img\"\nenable_debug = true\nrootless = false\n\
                [agent.kata]\ndial_timeout = 45\n[runtime]\nwarp = 9\n";
    fs::write(&file, text).unwrap();
    let kata = kata::read(&file).unwrap();
    let translation = translate(&kata, &known(), Path::new("/usr"));
    let report = Report {
        from: "/k/configuration.toml".into(),
        drop_ins: vec![],
        to: Some("/c/configuration.toml".into()),
        configuration: translation.text.clone(),
        entries: translation.entries,
        notes: translation.notes,
        problems: vec!["line 4:1: no".into()],
    };
    let expected = "\
/k/configuration.toml -> /c/configuration.toml

carried over:
  hypervisor.qemu.path = \"/usr/bin/q\"

renamed or rewritten:
  agent.kata.dial_timeout = 45  ->  runtime.boot_timeout_ms = 45000
  hypervisor.qemu.enable_debug = true  ->  runtime.log_level = \"debug\"

no equivalent:
  hypervisor.qemu.image = \"/k.img\": it has Kata Containers' agent in it; caisson's own guest is used
  runtime.warp = 9: neither caisson nor a Kata Containers that it knows has this key

off or empty, as without them:
  hypervisor.qemu.rootless = false

to mend before it can be used here:
  line 4:1: no
";
    assert_eq!(report.text(), expected);
    let ours = translation.text.split_once('\n').unwrap().1;
    let expected = "\n[hypervisor.qemu]\ninitrd = \"/usr/share/caisson/initrd.img\"\n\
                    kernel = \"/usr/share/caisson/vmlinux\"\npath = \"/usr/bin/q\"\n\
                    \n[runtime]\nboot_timeout_ms = 45000\nlog_level = \"debug\"\n";
    assert_eq!(ours, expected);
}
