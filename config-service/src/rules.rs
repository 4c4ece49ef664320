//! What holds between keys, and between keys and the host's files.

use crate::{
    check::{Checked, Setting},
    files,
    problem::Problem,
    watch::Watch,
};

/// Adds the problems that single keys do not show.
pub(crate) fn examine(checked: &mut Checked, watch: &mut Watch) {
    let found = [
        one_root_file_system(checked),
        maximum_is_no_minimum(checked, "default_vcpus", "default_maxvcpus"),
        maximum_is_no_minimum(checked, "default_memory", "default_maxmemory"),
        daemon_is_named(checked),
        kernel_is_named(checked),
    ];
    checked.problems.extend(found.into_iter().flatten());
    if checked.config.shared_fs.is_none() {
        checked.files.retain(|file| file.key != "virtio_fs_daemon");
    }
    let missing = missing_files(checked, watch);
    checked.problems.extend(missing);
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

/// The maximum's 0 stands for the initial value.
fn maximum_is_no_minimum(checked: &Checked, initial: &str, maximum: &str) -> Option<Problem> {
    let (initial, maximum) = (setting(checked, initial)?, setting(checked, maximum)?);
    let (least, most) = (initial.value.as_integer()?, maximum.value.as_integer()?);
    if most == 0 || most >= least {
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

fn missing_files(checked: &Checked, watch: &mut Watch) -> Vec<Problem> {
    let mut problems = Vec::new();
    for file in &checked.files {
        watch.look(&file.path);
        if let Err(why) = files::examine(&file.path, file.wanted) {
            let setting = &checked.settings[file.setting];
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
