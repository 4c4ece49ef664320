//! Mounting what containerd describes, and unmounting everything below a directory.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    thread,
};

use caisson_protocol::containerd::api::Mount;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

/// `mount(2)` copies one page of options; more is cut off without an error.
const MAX_DATA: usize = 4095;

/// Mounts one of containerd's mounts at `target`, as `mount(8)` would.
pub fn mount_at(description: &Mount, target: &Path) -> io::Result<()> {
    let Options { flags, propagation, mut data } = Options::parse(&description.options);
    let bind = flags.contains(MsFlags::MS_BIND);
    if data.len() > MAX_DATA {
        // Many image layers: say their common directory once, by working in it.
        let (directory, shorter) =
            relative_layers(&description.options).filter(|(_, shorter)| shorter.len() <= MAX_DATA).ok_or_else(
                || io::Error::new(io::ErrorKind::InvalidInput, "the image has too many layers for one overlay mount"),
            )?;
        data = shorter;
        return mount_in(directory, description.clone(), target.to_owned(), flags, data);
    }
    mount_call(description, target, flags, &data)?;
    if bind && flags.intersects(!(MsFlags::MS_BIND | MsFlags::MS_REC)) {
        // A bind ignores other flags until it is mounted again (mount(2), "Remounting").
        mount(None::<&str>, target, None::<&str>, flags | MsFlags::MS_REMOUNT, None::<&str>)?;
    }
    for kind in propagation {
        mount(None::<&str>, target, None::<&str>, kind, None::<&str>)?;
    }
    Ok(())
}

/// Mounts host path `source` at `target`.
pub fn bind(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let flags = if recursive { MsFlags::MS_BIND | MsFlags::MS_REC } else { MsFlags::MS_BIND };
    Ok(mount(Some(source), target, None::<&str>, flags, None::<&str>)?)
}

/// Makes what is mounted below `directory` from now on appear in copies of it that other mount namespaces hold.
pub fn make_shared(directory: &Path) -> io::Result<()> {
    bind(directory, directory, false)?;
    Ok(mount(None::<&str>, directory, None::<&str>, MsFlags::MS_SHARED, None::<&str>)?)
}

/// Unmounts everything at and below `directory`, innermost first. Mounts in use go when their last user does.
pub fn unmount_below(directory: &Path) -> io::Result<()> {
    let table = fs::read("/proc/self/mountinfo")?;
    let mut targets: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        // proc_pid_mountinfo(5): the fifth field is the mount point.
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .filter(|target| target.starts_with(directory))
        .collect();
    targets.reverse();
    let mut outcome = Ok(());
    for target in targets {
        match umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => outcome = Err(error.into()),
        }
    }
    outcome
}

struct Options {
    flags: MsFlags,
    propagation: Vec<MsFlags>,
    data: String,
}

impl Options {
    fn parse(words: &[String]) -> Self {
        let mut options = Self { flags: MsFlags::empty(), propagation: Vec::new(), data: String::new() };
        for word in words {
            match word.as_str() {
                "defaults" | "rw" | "suid" | "dev" | "exec" | "atime" | "diratime" | "async" => {}
                "ro" => options.flags |= MsFlags::MS_RDONLY,
                "nosuid" => options.flags |= MsFlags::MS_NOSUID,
                "nodev" => options.flags |= MsFlags::MS_NODEV,
                "noexec" => options.flags |= MsFlags::MS_NOEXEC,
                "noatime" => options.flags |= MsFlags::MS_NOATIME,
                "nodiratime" => options.flags |= MsFlags::MS_NODIRATIME,
                "relatime" => options.flags |= MsFlags::MS_RELATIME,
                "strictatime" => options.flags |= MsFlags::MS_STRICTATIME,
                "sync" => options.flags |= MsFlags::MS_SYNCHRONOUS,
                "bind" => options.flags |= MsFlags::MS_BIND,
                "rbind" => options.flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
                "private" => options.propagation.push(MsFlags::MS_PRIVATE),
                "rprivate" => options.propagation.push(MsFlags::MS_PRIVATE | MsFlags::MS_REC),
                "slave" => options.propagation.push(MsFlags::MS_SLAVE),
                "rslave" => options.propagation.push(MsFlags::MS_SLAVE | MsFlags::MS_REC),
                "shared" => options.propagation.push(MsFlags::MS_SHARED),
                "rshared" => options.propagation.push(MsFlags::MS_SHARED | MsFlags::MS_REC),
                data => {
                    if !options.data.is_empty() {
                        options.data.push(',');
                    }
                    options.data.push_str(data);
                }
            }
        }
        options
    }
}

fn mount_call(description: &Mount, target: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    let data = (!data.is_empty()).then_some(data);
    Ok(mount(Some(description.source.as_str()), target, Some(description.type_.as_str()), flags, data)?)
}

/// Mounts with `directory` as working directory, in a thread that shares it with nobody.
fn mount_in(directory: PathBuf, description: Mount, target: PathBuf, flags: MsFlags, data: String) -> io::Result<()> {
    let work = move || {
        unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(&directory)?;
        mount_call(&description, &target, flags, &data)
    };
    thread::spawn(work).join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread ended early")))
}

/// Overlay options whose layers are relative to the directory that they have in common.
fn relative_layers(options: &[String]) -> Option<(PathBuf, String)> {
    let lower = options.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common = layers.first()?.parent()?.to_owned();
    while !layers.iter().all(|layer| layer.starts_with(&common)) {
        common = common.parent()?.to_owned();
    }
    let relative: Option<Vec<&str>> = layers.iter().map(|layer| layer.strip_prefix(&common).ok()?.to_str()).collect();
    let others = options.iter().filter(|option| !option.starts_with("lowerdir="));
    let Options { data, .. } = Options::parse(&others.cloned().collect::<Vec<_>>());
    let comma = if data.is_empty() { "" } else { "," };
    Some((common, format!("lowerdir={}{comma}{data}", relative?.join(":"))))
}

/// Undoes the kernel's octal escapes (`\040` for a space) in mount tables.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..b'8').contains(d)));
        match octal {
            Some(digits) => {
                path.push(digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
                rest = &tail[3..];
            }
            None => {
                path.push(byte);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(options: &[&str]) -> Vec<String> {
        options.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let options = Options::parse(&words(&["rbind", "ro", "size=4m", "mode=755"]));
        assert_eq!(options.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
        assert_eq!(options.data, "size=4m,mode=755");
    }

    #[test]
    fn layers_are_made_relative_to_their_common_directory() {
        let (directory, data) =
            relative_layers(&words(&["index=off", "lowerdir=/var/snapshots/12/fs:/var/snapshots/7/fs", "upperdir=/u"]))
                .unwrap();
        assert_eq!(directory, Path::new("/var/snapshots"));
        assert_eq!(data, "lowerdir=12/fs:7/fs,index=off,upperdir=/u");
    }

    #[test]
    fn escaped_mount_points_are_read() {
        assert_eq!(unescape(b"/run/a\\040b"), Path::new("/run/a b"));
        assert_eq!(unescape(b"/plain\\"), Path::new("/plain\\"));
    }

    #[test]
    fn binds_are_made_and_unmounted_below_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("tree/with space"));
        fs::create_dir_all(&source).unwrap();
        fs::create_dir_all(&target).unwrap();
        fs::write(source.join("file"), "seen").unwrap();
        let description = Mount {
            type_: "bind".into(),
            source: source.to_str().unwrap().into(),
            options: words(&["rbind", "ro"]),
            ..Default::default()
        };
        match mount_at(&description, &target) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                println!("skipped: mounting needs root");
                return;
            }
            outcome => outcome.unwrap(),
        }
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "seen");
        assert!(fs::write(target.join("file"), "x").is_err(), "a read-only bind was written");
        unmount_below(&dir.path().join("tree")).unwrap();
        assert!(!target.join("file").exists());
    }
}
