//! The guest as a machine: its clock, entropy, name, processors and memory.

use std::{fs, fs::File, io::Write, path::Path, time::Duration};

use nix::{
    mount::{MsFlags, mount},
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
    unistd::sethostname,
};

use crate::{
    error::{Attempt, Error, Result},
    sys, uevents,
};

/// `linux/random.h` takes no more at once.
pub const MAX_ENTROPY: usize = 512;
/// How long processors that were plugged in may take to be seen.
const PROCESSOR_LIMIT: Duration = Duration::from_secs(5);
const PROCESSORS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";

/// Sets the clock.
///
/// # Errors
/// When the time is before 1970.
pub fn set_time(unix_ns: i64) -> Result<()> {
    let time = u64::try_from(unix_ns).map_err(|_| Error::Invalid(format!("{unix_ns} ns is before 1970")))?;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(Duration::from_nanos(time))).attempt("set the clock")
}

/// Mixes the host's entropy into the guest's, as a guest that was cloned or restored needs it.
///
/// # Errors
/// When there is too much of it.
pub fn reseed(entropy: &[u8]) -> Result<()> {
    if entropy.len() > MAX_ENTROPY {
        return Err(Error::Invalid(format!("{} bytes of entropy are more than {MAX_ENTROPY}", entropy.len())));
    }
    let mut random = File::options().write(true).open("/dev/urandom").attempt("open /dev/urandom")?;
    random.write_all(entropy).attempt("write to /dev/urandom")?;
    let bits = entropy.len() as i32 * 8;
    sys::credit_entropy(&random, bits).attempt("have the kernel use the entropy")
}

/// Names the guest.
///
/// # Errors
/// When the name is longer than the kernel's 64 bytes.
pub fn set_hostname(name: &str) -> Result<()> {
    sethostname(name).attempt(format_args!("set the hostname to {name}"))
}

/// Writes `/etc/resolv.conf`, also where the root file system is read-only.
///
/// # Errors
/// When there is no `/etc`, or the kernel has no overlay file system to make it writable with.
pub fn set_dns(lines: &[String]) -> Result<()> {
    const CONFIG: &str = "/etc/resolv.conf";
    let text = lines.iter().fold(String::new(), |text, line| text + line + "\n");
    let _ = fs::create_dir_all("/etc");
    if fs::write(CONFIG, &text).is_ok() {
        return Ok(());
    }
    for layer in ["/run/etc/upper", "/run/etc/work"] {
        fs::create_dir_all(layer).attempt(format_args!("make {layer}"))?;
    }
    let layers = "lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work";
    mount(Some("overlay"), "/etc", Some("overlay"), MsFlags::empty(), Some(layers)).attempt("make /etc writable")?;
    fs::write(CONFIG, &text).attempt(format_args!("write {CONFIG}"))
}

/// Brings memory and processors into use, and waits until there are `vcpus` of them.
///
/// # Errors
/// When fewer appear.
pub async fn online(vcpus: u32) -> Result<()> {
    let enough = || {
        online_memory();
        online_processors();
        (self::vcpus() >= vcpus).then_some(())
    };
    uevents::until(&format!("processor {vcpus}"), PROCESSOR_LIMIT, enough).await
}

/// Processors in use.
pub fn vcpus() -> u32 {
    let listed = fs::read_to_string(Path::new(PROCESSORS).join("online")).unwrap_or_default();
    count(listed.trim()).max(1)
}

/// Memory in use, in bytes.
pub fn memory_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    kib(&text, "MemTotal:") * 1024
}

/// The number of a `key:  number kB` line of `proc(5)`.
pub fn kib(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn online_processors() {
    for processor in fs::read_dir(PROCESSORS).into_iter().flatten().flatten() {
        // Those that are in use, and the directories that are none, refuse.
        let switch = processor.path().join("online");
        if fs::read_to_string(&switch).is_ok_and(|state| state.trim() == "0") {
            let _ = fs::write(switch, "1");
        }
    }
}

fn online_memory() {
    for block in fs::read_dir(MEMORY).into_iter().flatten().flatten() {
        let state = block.path().join("state");
        if fs::read_to_string(&state).is_ok_and(|state| state.trim() == "offline") {
            let _ = fs::write(state, "online");
        }
    }
}

/// How many numbers a list as `0-3,8` has.
fn count(list: &str) -> u32 {
    let length = |range: &str| match range.split_once('-') {
        Some((first, last)) => {
            let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
            Some(last.checked_sub(first)?.saturating_add(1))
        }
        None => range.parse::<u32>().ok().map(|_| 1),
    };
    list.split(',').filter_map(length).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_ranges_is_counted() {
        assert_eq!(count("0-3,8"), 5);
        assert_eq!(count("0"), 1);
        assert_eq!(count(""), 0);
    }

    #[test]
    fn a_line_of_memory_is_read() {
        assert_eq!(kib("MemTotal:   2048 kB\nMemFree: 1 kB\n", "MemFree:"), 1);
    }

    #[test]
    fn too_much_entropy_and_a_time_before_1970_are_refused() {
        assert!(matches!(reseed(&[0; MAX_ENTROPY + 1]), Err(Error::Invalid(_))));
        assert!(matches!(set_time(-1), Err(Error::Invalid(_))));
    }
}
