//! The shipped configuration says of every key what the types say.

use std::collections::BTreeMap;

use caisson_config_service::keys::{AGENT, HYPERVISOR, Key, RUNTIME};

const SHIPPED: &str = include_str!("../defaults/configuration-qemu.toml");

/// The shipped file with its commented keys switched on.
fn with_every_key() -> toml::Table {
    let lines = SHIPPED.lines().map(|line| match line.strip_prefix('#') {
        Some(key) if key.starts_with(|first: char| first.is_ascii_lowercase()) => key,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n").parse().unwrap()
}

fn defaults(keys: &[Key]) -> BTreeMap<&str, toml::Value> {
    keys.iter()
        .map(|key| (key.name, toml::from_str::<toml::Table>(&format!("x = {}", key.default)).unwrap()["x"].clone()))
        .collect()
}

fn written(table: &toml::Value) -> BTreeMap<&str, toml::Value> {
    table.as_table().unwrap().iter().map(|(key, value)| (key.as_str(), value.clone())).collect()
}

#[test]
fn the_file_has_every_key_with_its_default() {
    let file = with_every_key();
    let mut hypervisor = defaults(HYPERVISOR);
    // The two that the file sets, being for one hypervisor and one image.
    hypervisor.insert("path", "/usr/bin/qemu-system-x86_64".into());
    hypervisor.insert("initrd", "/usr/share/caisson/initrd.img".into());
    assert_eq!(written(&file["hypervisor"]["qemu"]), hypervisor);
    assert_eq!(written(&file["agent"]), defaults(AGENT));
    assert_eq!(written(&file["runtime"]), defaults(RUNTIME));
}

#[test]
fn the_file_explains_every_key_in_the_types_words() {
    let prose = SHIPPED.lines().filter_map(|line| line.strip_prefix("# ")).collect::<Vec<_>>().join(" ");
    let exceptions = ["initrd", "image", "shared_fs", "virtio_fs_cache", "log_level"];
    let missing: Vec<_> = HYPERVISOR
        .iter()
        .chain(AGENT)
        .chain(RUNTIME)
        .filter(|key| !exceptions.contains(&key.name) && !prose.contains(key.meaning))
        .map(|key| key.name)
        .collect();
    assert_eq!(missing, [""; 0]);
}
