//! What holds between keys, between keys and the host's files, and between keys and what a hypervisor can do.

use crate::{
    annotations::allows,
    check::{Checked, Setting},
    files, host,
    keys::{AGENT, ENABLE_ANNOTATIONS, HYPERVISOR, Key, RUNTIME, Takes, valid_paths},
    launchers::{Ability, Capabilities, LauncherOption},
    problem::{Place, Problem, quote, suggest},
    watch::Watch,
};

/// Adds the problems that single keys do not show. `options` are the launcher's, none when they could not be had.
pub(crate) fn examine(checked: &mut Checked, options: Option<&[LauncherOption]>, watch: &mut Watch) {
    let mut found: Vec<_> = [
        one_root_file_system(checked),
        maximum_is_no_minimum(checked, "default_vcpus", "default_maxvcpus"),
        maximum_is_no_minimum(checked, "default_memory", "default_maxmemory"),
        rootfs_has_a_way(checked),
        kernel_is_named(checked),
    ]
    .into_iter()
    .flatten()
    .collect();
    found.extend(nothing_is_in_vain(checked));
    found.extend(options.map(|options| values_go_together(checked, options)).unwrap_or_default());
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

/// What is asked of the hypervisor that it cannot do.
pub(crate) struct Beyond {
    pub(crate) problem: Problem,
    /// What the hypervisor lacks; none when it is this machine that lacks something.
    pub(crate) ability: Option<Ability>,
}

/// Everything that is asked of the hypervisor and is beyond what it, or this machine under it, can do.
pub(crate) fn beyond(checked: &Checked, capabilities: &Capabilities) -> Vec<Beyond> {
    use Ability::{Confidential, Named};
    let number = |name| setting(checked, name).and_then(|setting| setting.value.as_integer()).unwrap_or_default();
    let config = &checked.config;
    let vm = config.vm.clone().unwrap_or_default();
    let plugs = setting(checked, "cold_plug_vfio").is_some_and(|setting| setting.value.as_str() != Some("no-port"));
    let grows = number("default_maxvcpus") > i64::from(vm.vcpus);
    let gains = number("default_maxmemory") > number("default_memory");
    let asked = [
        (config.shared_fs.is_some(), "shared_fs", Named("fs"), "virtio-fs", "set it to \"none\""),
        (!vm.image.is_empty(), "image", Named("block"), "disks", "use initrd instead"),
        (config.block_rootfs.is_some(), "rootfs", Named("block"), "disks", "set it to \"virtio-fs\""),
        (grows, "default_maxvcpus", Named("resize-vcpus"), "vCPU hotplug", "set it to 0"),
        (gains, "default_maxmemory", Named("resize-memory"), "memory hotplug", "set it to 0"),
        (vm.huge_pages, "enable_hugepages", Named("huge-pages"), "huge pages", "set it to false"),
        (plugs, "cold_plug_vfio", Named("cold-plug-vfio"), "devices of the host", "set it to \"no-port\""),
        (vm.confidential_guest, "confidential_guest", Confidential, "confidential guests", "set it to false"),
    ];
    let program = [&config.hypervisor, capabilities.version.as_str()].join(" ");
    let mut found: Vec<_> = asked
        .into_iter()
        .filter(|(asked, _, ability, ..)| *asked && !capabilities.has(*ability))
        .filter_map(|(_, key, ability, words, remedy)| {
            let setting = setting(checked, key)?;
            let reason = capabilities.reason(ability).map(|reason| format!(" ({reason})")).unwrap_or_default();
            let text = format!("found {}, but {} has no {words}{reason}; {remedy}", setting.value, program.trim());
            let problem = Problem::of_key(setting.origin.as_ref(), &setting.key, text);
            Some(Beyond { problem, ability: Some(ability) })
        })
        .collect();
    let mut of_this_machine = Vec::new();
    if vm.confidential_guest && capabilities.has(Confidential) {
        of_this_machine.extend(processor_keeps_secrets(checked, capabilities, host::starts_confidential));
    }
    if vm.huge_pages && capabilities.has(Named("huge-pages")) {
        of_this_machine.extend(huge_pages_are_reserved(checked, host::huge_pages_mib()));
    }
    found.extend(of_this_machine.into_iter().map(|problem| Beyond { problem: problem.passing(), ability: None }));
    found
}

/// This machine has switched on one of the kinds of confidential guests that the hypervisor starts.
fn processor_keeps_secrets(
    checked: &Checked,
    capabilities: &Capabilities,
    is_on: impl Fn(&str) -> bool,
) -> Option<Problem> {
    let kinds = capabilities.confidential();
    if kinds.iter().any(|kind| is_on(kind)) {
        return None;
    }
    let setting = setting(checked, "confidential_guest")?;
    let text = format!("found true, but this machine has not switched on {}; set it to false", kinds.join(" or "));
    Some(Problem::of_key(setting.origin.as_ref(), &setting.key, text))
}

/// As many as the sandbox has at least; more are missing when the launcher finds them missing.
fn huge_pages_are_reserved(checked: &Checked, reserved: u64) -> Option<Problem> {
    let setting = setting(checked, "enable_hugepages")?;
    let wanted = checked.config.vm.as_ref()?.memory_mib.next_multiple_of(2);
    let text = format!(
        "found true, but this machine has reserved {reserved} MiB of huge pages of 2 MiB, and default_memory takes \
         {wanted} MiB; reserve more: sysctl vm.nr_hugepages={}",
        wanted / 2
    );
    (reserved < wanted).then(|| Problem::of_key(setting.origin.as_ref(), &setting.key, text))
}

/// Values that the launcher allows only beside another key's.
fn values_go_together(checked: &Checked, options: &[LauncherOption]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for option in options {
        let Some(written) = setting(checked, &option.key) else { continue };
        for (key, needed) in option.needs(&written.value) {
            let Some(other) = setting(checked, key).filter(|other| other.value != *needed) else { continue };
            let (found, place) = (&other.value, origin(other));
            let text = format!("found {}, which needs {key} = {needed}, but that is {found} at {place}", written.value);
            problems.push(Problem::of_key(written.origin.as_ref(), &written.key, text));
        }
    }
    problems
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{check, document};

    fn checked(text: &str) -> Checked {
        let document = document::parse(text, 0, std::path::Path::new("/c.toml")).unwrap();
        check::check(&document, Some("qemu"), Some(&[]))
    }

    #[test]
    fn fewer_huge_pages_than_the_guest_takes_are_told_with_how_to_reserve_them() {
        let checked = checked("[hypervisor.qemu]\nenable_hugepages = true\ndefault_memory = 257");
        assert_eq!(huge_pages_are_reserved(&checked, 258), None);
        assert_eq!(
            huge_pages_are_reserved(&checked, 200).unwrap().to_string(),
            "/c.toml:2:1: hypervisor.qemu.enable_hugepages: found true, but this machine has reserved 200 MiB of huge \
             pages of 2 MiB, and default_memory takes 258 MiB; reserve more: sysctl vm.nr_hugepages=129"
        );
    }

    #[test]
    fn a_confidential_guest_needs_a_processor_that_has_switched_it_on() {
        let checked = checked("[hypervisor.qemu]\nconfidential_guest = true");
        let capabilities: Capabilities = serde_json::from_str(r#"{"confidential": ["tdx", "sev-snp"]}"#).unwrap();
        assert_eq!(processor_keeps_secrets(&checked, &capabilities, |kind| kind == "sev-snp"), None);
        assert_eq!(
            processor_keeps_secrets(&checked, &capabilities, |_| false).unwrap().to_string(),
            "/c.toml:2:1: hypervisor.qemu.confidential_guest: found true, but this machine has not switched on tdx or \
             sev-snp; set it to false"
        );
    }
}
