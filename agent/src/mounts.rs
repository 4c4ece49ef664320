//! Mounts and unmounts, with options as `mount(8)` writes them.

use std::{fs, path::Path, path::PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{Attempt, Result};

/// Mounts `source` on `target`, which is made when it does not exist: a directory, or a file for a bound file.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_on(target: &Path, kind: &str, source: &str, options: &[String]) -> Result<()> {
    let what = format!("mount {kind} {source} on {}", target.display());
    let options = Options::parse(options);
    let is_bind = kind == "bind" || options.flags.contains(MsFlags::MS_BIND);
    make_target(target, is_bind.then_some(Path::new(source))).attempt(format_args!("make {}", target.display()))?;
    let bind = if is_bind { MsFlags::MS_BIND } else { MsFlags::empty() };
    let kind = (!is_bind).then_some(kind);
    let data = (!options.data.is_empty()).then(|| options.data.join(","));
    mount(Some(source), target, kind, options.flags | bind, data.as_deref()).attempt(&what)?;
    // A bind mount takes its flags only when it is mounted again.
    if is_bind && options.flags.intersects(FLAGS_OF_A_MOUNT) {
        let flags = (options.flags & FLAGS_OF_A_MOUNT) | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>).attempt(&what)?;
    }
    if !options.propagation.is_empty() {
        mount(None::<&str>, target, None::<&str>, options.propagation, None::<&str>).attempt(&what)?;
    }
    Ok(())
}

/// Unmounts everything at and below `directory`, the latest first. What is in use goes when its last user does.
///
/// # Errors
/// When the kernel refuses.
pub fn unmount_below(directory: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").attempt("read the table of mounts")?;
    for point in mount_points(&table).filter(|point| point.starts_with(directory)).collect::<Vec<_>>().iter().rev() {
        umount2(point, MntFlags::MNT_DETACH).attempt(format_args!("unmount {}", point.display()))?;
    }
    Ok(())
}

/// Mount points in the order in which they were mounted; `proc(5)` writes blanks in octal.
fn mount_points(table: &str) -> impl Iterator<Item = PathBuf> {
    table.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| {
        point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\").into()
    })
}

fn make_target(target: &Path, bound: Option<&Path>) -> std::io::Result<()> {
    match bound.map(fs::metadata) {
        Some(Ok(source)) if !source.is_dir() => {
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::File::options().create(true).append(true).open(target).map(drop)
        }
        _ => fs::create_dir_all(target),
    }
}

const FLAGS_OF_A_MOUNT: MsFlags = MsFlags::MS_RDONLY
    .union(MsFlags::MS_NOSUID)
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC)
    .union(MsFlags::MS_NOATIME)
    .union(MsFlags::MS_NODIRATIME)
    .union(MsFlags::MS_RELATIME);

#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    propagation: MsFlags,
    /// For the file system itself.
    data: Vec<String>,
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut parsed = Self { flags: MsFlags::empty(), propagation: MsFlags::empty(), data: Vec::new() };
        for option in options.iter().filter(|option| !option.is_empty()) {
            match option.as_str() {
                "rw" | "defaults" | "suid" | "dev" | "exec" | "async" | "loop" => {}
                "ro" => parsed.flags |= MsFlags::MS_RDONLY,
                "nosuid" => parsed.flags |= MsFlags::MS_NOSUID,
                "nodev" => parsed.flags |= MsFlags::MS_NODEV,
                "noexec" => parsed.flags |= MsFlags::MS_NOEXEC,
                "sync" => parsed.flags |= MsFlags::MS_SYNCHRONOUS,
                "dirsync" => parsed.flags |= MsFlags::MS_DIRSYNC,
                "noatime" => parsed.flags |= MsFlags::MS_NOATIME,
                "nodiratime" => parsed.flags |= MsFlags::MS_NODIRATIME,
                "relatime" => parsed.flags |= MsFlags::MS_RELATIME,
                "strictatime" => parsed.flags |= MsFlags::MS_STRICTATIME,
                "bind" => parsed.flags |= MsFlags::MS_BIND,
                "rbind" => parsed.flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
                "private" => parsed.propagation |= MsFlags::MS_PRIVATE,
                "rprivate" => parsed.propagation |= MsFlags::MS_PRIVATE | MsFlags::MS_REC,
                "shared" => parsed.propagation |= MsFlags::MS_SHARED,
                "rshared" => parsed.propagation |= MsFlags::MS_SHARED | MsFlags::MS_REC,
                "slave" => parsed.propagation |= MsFlags::MS_SLAVE,
                "rslave" => parsed.propagation |= MsFlags::MS_SLAVE | MsFlags::MS_REC,
                other => parsed.data.push(other.to_owned()),
            }
        }
        parsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(&options.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn flags_propagation_and_the_file_systems_own_options_are_told_apart() {
        let options = parse(&["rbind", "ro", "rslave", "lowerdir=/a:/b"]);
        assert_eq!(options.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
        assert_eq!(options.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(options.data, ["lowerdir=/a:/b"]);
    }

    #[test]
    fn a_mount_point_with_a_blank_is_read_back() {
        let table = "22 1 0:20 / /run/a\\040b rw - tmpfs tmpfs rw\n23 22 0:21 / /run/a\\040b/c rw - tmpfs tmpfs rw\n";
        let points: Vec<_> = mount_points(table).collect();
        assert_eq!(points, [PathBuf::from("/run/a b"), PathBuf::from("/run/a b/c")]);
    }

    #[test]
    fn a_bound_file_gets_a_file_to_lie_on() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("deep/target"));
        fs::write(&source, "x").unwrap();
        make_target(&target, Some(&source)).unwrap();
        assert!(target.is_file());
    }
}
