//! Values that caisson writes in another way.

use std::collections::BTreeSet;

use toml::Value;

type Converted = Result<Value, String>;
/// The names of the keys that our table may have.
type Keys = BTreeSet<String>;

/// Any debugging switch that is on asks for a log in detail.
pub(super) fn debug(value: &Value, _: &Keys) -> Converted {
    match value {
        Value::Boolean(true) => Ok("debug".into()),
        _ => Err("it is no true or false".to_owned()),
    }
}

/// Kata's levels, of which caisson has five.
pub(super) fn log_level(value: &Value, _: &Keys) -> Converted {
    match value.as_str() {
        Some(level @ ("error" | "warn" | "info" | "debug" | "trace")) => Ok(level.into()),
        Some("warning") => Ok("warn".into()),
        Some("critical" | "fatal" | "panic") => Ok("error".into()),
        _ => Err("caisson has the levels error, warn, info, debug and trace".to_owned()),
    }
}

/// Seconds in milliseconds.
pub(super) fn seconds(value: &Value, _: &Keys) -> Converted {
    let milliseconds = value.as_integer().and_then(|seconds| seconds.checked_mul(1000));
    milliseconds.filter(|milliseconds| *milliseconds > 0).map(Value::from).ok_or_else(|| "it is no time".to_owned())
}

/// How long the Rust runtime waits for the agent in all: never less than ten seconds.
pub(super) fn reconnect(value: &Value, _: &Keys) -> Converted {
    value.as_integer().map(|milliseconds| milliseconds.max(10_000).into()).ok_or_else(|| "it is no time".to_owned())
}

/// What is not addressed to Kata's agent or to systemd in its guest.
pub(super) fn kernel_params(value: &Value, _: &Keys) -> Converted {
    let params = value.as_str().ok_or_else(|| "it is no string".to_owned())?;
    let is_katas = |param: &str| {
        ["agent.", "systemd.", "cgroup_no_v1=", "console=", "root=", "rootflags=", "rootfstype=", "init="]
            .iter()
            .any(|prefix| param.starts_with(prefix))
    };
    let ours: Vec<_> = params.split_whitespace().filter(|param| !is_katas(param)).collect();
    if ours.is_empty() {
        return Err("it only speaks to Kata Containers' agent and guest".to_owned());
    }
    Ok(ours.join(" ").into())
}

/// caisson's disks are virtio-blk, on the bus that the hypervisor's machine has.
pub(super) fn block_device_driver(value: &Value, _: &Keys) -> Converted {
    match value.as_str() {
        Some("virtio-blk" | "virtio-blk-pci" | "virtio-blk-mmio" | "virtio-mmio") => Ok("virtio-blk".into()),
        _ => Err("caisson's disks are virtio-blk".to_owned()),
    }
}

pub(super) fn shared_fs(value: &Value, _: &Keys) -> Converted {
    match value.as_str() {
        Some(kind @ ("virtio-fs" | "none")) => Ok(kind.into()),
        Some("inline-virtio-fs" | "virtio-9p") => Ok("virtio-fs".into()),
        Some("virtio-fs-nydus") => Err("caisson has no nydus; without this key it shares by virtio-fs".to_owned()),
        _ => Err("caisson shares by virtio-fs or not at all".to_owned()),
    }
}

/// 0 is all of the host in Kata, and no growth in caisson.
pub(super) fn limit(value: &Value, _: &Keys) -> Converted {
    match value.as_integer() {
        Some(0) => {
            Err("0 is all of the host there and no growth here; set the number if sandboxes shall grow".to_owned())
        }
        _ => Ok(value.clone()),
    }
}

/// Kata's are regular expressions that match anywhere, ours the names of our keys, or globs.
pub(super) fn annotations(value: &Value, known: &Keys) -> Converted {
    let patterns = value.as_array().ok_or_else(|| "it is no array".to_owned())?;
    let globs = patterns.iter().filter_map(Value::as_str).filter_map(glob);
    let ours: Vec<_> = globs.filter(|glob| glob.contains('*') || known.contains(glob)).map(Value::from).collect();
    if ours.is_empty() && !patterns.is_empty() {
        return Err("none of its patterns names a key of caisson's".to_owned());
    }
    Ok(ours.into())
}

/// None for what a glob cannot say.
fn glob(pattern: &str) -> Option<String> {
    let pattern = pattern.trim_start_matches('^').trim_end_matches('$');
    let glob = pattern.replace(".*", "*");
    glob.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'*')).then_some(glob)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> Keys {
        Keys::new()
    }

    #[test]
    fn what_speaks_to_katas_agent_is_left_out_of_the_kernels_parameters() {
        let theirs = Value::from("agent.log=debug systemd.unit=x console=ttyS0 mitigations=off  nosmt");
        assert_eq!(kernel_params(&theirs, &none()).unwrap().as_str(), Some("mitigations=off nosmt"));
        assert!(kernel_params(&"agent.log=debug".into(), &none()).is_err());
    }

    #[test]
    fn seconds_become_milliseconds() {
        assert_eq!(seconds(&45.into(), &none()).unwrap().as_integer(), Some(45_000));
        assert!(seconds(&i64::MAX.into(), &none()).is_err());
    }

    #[test]
    fn names_and_globs_are_allowed_on_and_other_patterns_are_not() {
        let theirs = Value::from(vec!["kernel_params", "^default_.*$", ".*", "(a|b)", "enable_iommu"]);
        let ours = annotations(&theirs, &["kernel_params".to_owned()].into()).unwrap();
        assert_eq!(ours.to_string(), r#"["kernel_params", "default_*", "*"]"#);
    }

    #[test]
    fn a_list_of_nothing_stays_one() {
        assert_eq!(annotations(&Value::Array(vec![]), &none()).unwrap(), Value::Array(vec![]));
        assert!(annotations(&Value::from(vec!["enable_iommu"]), &none()).is_err());
    }

    #[test]
    fn no_growth_is_not_unlimited_growth() {
        assert!(limit(&0.into(), &none()).is_err());
        assert_eq!(limit(&8.into(), &none()).unwrap().as_integer(), Some(8));
    }
}
