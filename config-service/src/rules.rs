//! What holds between keys, between keys and the host's files, and between keys and what a hypervisor can do.

use crate::{
    annotations::allows,
    check::{Checked, Setting},
    files,
    keys::{AGENT, ENABLE_ANNOTATIONS, HYPERVISOR, Key, RUNTIME, Takes, valid_paths},
    launchers::{Capabilities, LauncherOption},
    problem::{Place, Problem, quote, suggest},
    watch::Watch,
};

/// Adds the problems that single keys do not show. `options` and `capabilities` are the launcher's, none when they
/// could not be had.
pub(crate) fn examine(
    checked: &mut Checked,
    options: Option<&[LauncherOption]>,
    capabilities: Option<&Capabilities>,
    watch: &mut Watch,
) {
    let mut found: Vec<_> = [
        one_root_file_system(checked),
        maximum_is_no_minimum(checked, "default_vcpus", "default_maxvcpus"),
        maximum_is_no_minimum(checked, "default_memory", "default_maxmemory"),
        daemon_is_named(checked),
        rootfs_has_a_way(checked),
        kernel_is_named(checked),
    ]
    .into_iter()
    .flatten()
    .collect();
    found.extend(nothing_is_in_vain(checked));
    found.extend(capabilities.map(|capabilities| hypervisor_can(checked, capabilities)).unwrap_or_default());
    found.extend(options.map(|options| annotations_have_keys(checked, options)).unwrap_or_default());
    found.extend(missing_files(checked, watch));
    checked.problems.extend(found);
}

fn one_root_file_system(checked: &Checked) -> Option<Problem> {
    let (initrd, image) = (setting(checked, "initrd")?, setting(checked, "image")?);
    if is_empty(initrd) || is_empty(image) {
        return None;
    }
    let (last, first) = if image.origin >= initrd.origin { (image, initrd) } else { (initrd, image) };
    let text = format!("excludes {}, which is set at {}; set one of the two to \"\"", first.key, origin(first));
    Some(Problem::of_key(last.origin.as_ref(), &last.key, text))
}

/// The maximum's 0 stands for the initial value, the initial value's -1 for what the host has.
fn maximum_is_no_minimum(checked: &Checked, initial: &str, maximum: &str) -> Option<Problem> {
    let (initial, maximum) = (setting(checked, initial)?, setting(checked, maximum)?);
    let most = maximum.value.as_integer()?;
    let least = initial.value.as_float().or_else(|| initial.value.as_integer().map(|least| least as f64))?;
    if most == 0 || most as f64 >= least {
        return None;
    }
    let text = format!("found {most}, expected 0 or at least the {least} of {} at {}", initial.key, origin(initial));
    Some(Problem::of_key(maximum.origin.as_ref(), &maximum.key, text))
}

fn daemon_is_named(checked: &Checked) -> Option<Problem> {
    let daemon = setting(checked, "virtio_fs_daemon")?;
    let text = "found \"\", expected the absolute path of a program, since shared_fs is \"virtio-fs\"";
    (checked.config.shared_fs.is_some() && is_empty(daemon))
        .then(|| Problem::of_key(daemon.origin.as_ref(), &daemon.key, text))
}

fn kernel_is_named(checked: &Checked) -> Option<Problem> {
    let kernel = setting(checked, "kernel")?;
    let text = "found \"\", expected the absolute path of a file";
    is_empty(kernel).then(|| Problem::of_key(kernel.origin.as_ref(), &kernel.key, text))
}

fn rootfs_has_a_way(checked: &Checked) -> Option<Problem> {
    let rootfs = setting(checked, "rootfs")?;
    if checked.config.shared_fs.is_some() || rootfs.value.as_str() != Some("virtio-fs") {
        return None;
    }
    let off = setting(checked, "shared_fs")?;
    let text = format!("found \"virtio-fs\", but {} is \"none\" at {}; set it to \"block\"", off.key, origin(off));
    Some(Problem::of_key(rootfs.origin.as_ref(), &rootfs.key, text))
}

/// What is written has an effect, unless a later file has switched it off.
fn nothing_is_in_vain(checked: &Checked) -> Vec<Problem> {
    let config = &checked.config;
    let memory = setting(checked, "rootfs_writable").is_some_and(|setting| setting.value.as_str() == Some("memory"));
    let in_vain: [(bool, &str, &[&str]); 3] = [
        (config.shared_fs.is_none(), "shared_fs", &["virtio_fs_daemon", "virtio_fs_cache", "virtio_fs_extra_args"]),
        (config.block_rootfs.is_none(), "rootfs", &["rootfs_writable", "rootfs_disk_size", "rootfs_max_disks"]),
        (config.block_rootfs.is_some() && memory, "rootfs_writable", &["rootfs_disk_size"]),
    ];
    let layer = |setting: &Setting| setting.origin.as_ref().map(Place::layer);
    let mut problems = Vec::new();
    for (_, switch, names) in in_vain.into_iter().filter(|(off, ..)| *off) {
        let Some(switch) = setting(checked, switch) else { continue };
        let written = names.iter().filter_map(|name| setting(checked, name)).filter(|setting| setting.origin.is_some());
        for setting in written.filter(|setting| layer(setting) >= layer(switch)) {
            let text = format!("has no effect, since {} is {} at {}", switch.key, switch.value, origin(switch));
            problems.push(Problem::of_key(setting.origin.as_ref(), &setting.key, text));
        }
    }
    problems
}

fn hypervisor_can(checked: &Checked, capabilities: &Capabilities) -> Vec<Problem> {
    let number = |name| setting(checked, name).and_then(|setting| setting.value.as_integer()).unwrap_or_default();
    let config = &checked.config;
    let vm = config.vm.clone().unwrap_or_default();
    let asked = [
        (config.shared_fs.is_some(), "shared_fs", "fs", "virtio-fs", "set it to \"none\""),
        (!vm.image.is_empty(), "image", "block", "disks", "use initrd instead"),
        (config.block_rootfs.is_some(), "rootfs", "block", "disks", "set it to \"virtio-fs\""),
        (
            number("default_maxvcpus") > i64::from(vm.vcpus),
            "default_maxvcpus",
            "resize-vcpus",
            "vCPU hotplug",
            "set it to 0",
        ),
        (
            number("default_maxmemory") > number("default_memory"),
            "default_maxmemory",
            "resize-memory",
            "memory hotplug",
            "set it to 0",
        ),
    ];
    asked
        .into_iter()
        .filter(|(asked, _, ability, ..)| *asked && !capabilities.has(ability))
        .filter_map(|(_, key, ability, words, remedy)| {
            let setting = setting(checked, key)?;
            let reason = capabilities.reason(ability).map(|reason| format!(" ({reason})")).unwrap_or_default();
            let program = [&config.hypervisor, capabilities.version.as_str()].join(" ");
            let text = format!("found {}, but {} has no {words}{reason}; {remedy}", setting.value, program.trim());
            Some(Problem::of_key(setting.origin.as_ref(), &setting.key, text))
        })
        .collect()
}

/// Each element of `enable_annotations` allows something.
fn annotations_have_keys(checked: &Checked, options: &[LauncherOption]) -> Vec<Problem> {
    let Some(enabled) = setting(checked, ENABLE_ANNOTATIONS) else { return Vec::new() };
    let of = |section: &'static str, keys: &'static [Key]| {
        let keys = keys.iter().filter(|key| !matches!(key.takes, Takes::Globs));
        keys.map(move |key| (format!("{section}{}", key.name), key.is_path()))
    };
    let told = options.iter().map(|option| (option.key.clone(), option.is_path()));
    let keys: Vec<_> =
        of("", HYPERVISOR).chain(told).chain(of("agent.", AGENT)).chain(of("runtime.", RUNTIME)).collect();
    let names = || keys.iter().map(|(name, _)| name.as_str());
    let problem = |text| Problem::of_key(enabled.origin.as_ref(), &enabled.key, text);
    let mut problems = Vec::new();
    for glob in enabled.value.as_array().into_iter().flatten().filter_map(toml::Value::as_str) {
        if !names().any(|name| allows(glob, name)) {
            problems.push(problem(format!("{} is no key{}", quote(glob), suggest(glob, names()))));
        }
        let is_path = keys.iter().any(|(name, is_path)| *is_path && name == glob);
        let valid = valid_paths(glob);
        if is_path && setting(checked, &valid).is_none_or(|valid| valid.value.as_array().is_none_or(Vec::is_empty)) {
            problems.push(problem(format!("{} allows nothing without globs in {valid}", quote(glob))));
        }
    }
    problems
}

fn missing_files(checked: &Checked, watch: &mut Watch) -> Vec<Problem> {
    let mut problems = Vec::new();
    for file in &checked.files {
        let Some(setting) = checked.settings.get(file.setting) else { continue };
        if checked.config.shared_fs.is_none() && setting.key.ends_with(".virtio_fs_daemon") {
            continue;
        }
        watch.look(&file.path);
        if let Err(why) = files::examine(&file.path, file.wanted) {
            let default = if setting.origin.is_none() { ", the default," } else { "" };
            let text = format!("{}{default} {why}", file.path.display());
            problems.push(Problem::of_key(setting.origin.as_ref(), &setting.key, text));
        }
    }
    problems
}

/// The setting of the chosen hypervisor's key `name`; none when its value is wrong.
fn setting<'a>(checked: &'a Checked, name: &str) -> Option<&'a Setting> {
    let key = format!("hypervisor.{}.{name}", checked.config.hypervisor);
    checked.settings.iter().find(|setting| setting.key == key)
}

fn is_empty(setting: &Setting) -> bool {
    setting.value.as_str() == Some("")
}

fn origin(setting: &Setting) -> String {
    setting.origin.as_ref().map_or_else(|| "its default".to_owned(), ToString::to_string)
}
