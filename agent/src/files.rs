//! Makes small files, directories and symbolic links for the host: bundles, and what containers mount of the host where
//! it shares no directory. Only below one directory, and never through a symbolic link.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path},
};

use caisson_protocol::guest::{CopyFileRequest, FileKind};
use rustix::{
    fs::{
        AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, mkdirat, openat2, renameat,
        symlinkat, unlinkat,
    },
    io::Errno,
};

use crate::error::{Attempt, Error, Result};

/// The only place where the host writes.
pub const BASE: &str = "/run/caisson";
/// What one file may hold.
const MAX_BYTES: usize = 3 << 20;
/// What a new symbolic link is called until it takes the old one's place.
const NEW_LINK: &str = ".caisson-new-link";

/// Makes the path of `request` below [`BASE`] what the request says, and its parent directories with it.
///
/// # Errors
/// When the path leads elsewhere, the file is too large, or something else is in its place.
pub fn copy(request: &CopyFileRequest) -> Result<()> {
    copy_below(Path::new(BASE), request)
}

fn copy_below(base: &Path, request: &CopyFileRequest) -> Result<()> {
    let path = &request.path;
    if request.data.len() > MAX_BYTES {
        return Err(Error::Invalid(format!("write {path}: {} bytes are more than {MAX_BYTES}", request.data.len())));
    }
    let inside = Path::new(path).strip_prefix(base).ok().filter(|inside| is_plain(inside));
    let inside = inside
        .ok_or_else(|| Error::Invalid(format!("\"{}\" is no path below {}", path.escape_debug(), base.display())))?;
    let kind = request
        .kind
        .enum_value()
        .map_err(|number| Error::Invalid(format!("write {path}: {number} is no kind of file")))?;

    let done = open_parent(base, inside).and_then(|parent| {
        let name = inside.file_name().unwrap_or_default();
        match kind {
            FileKind::REGULAR_FILE => write_file(&parent, name, request),
            FileKind::DIRECTORY => make_directory(&parent, name, request),
            FileKind::NEW_DIRECTORY => make_new_directory(&parent, name, request),
            FileKind::SYMBOLIC_LINK => make_link(&parent, name, request),
            FileKind::NOTHING => remove(&parent, name),
        }
    });
    done.attempt(format_args!("write {path}"))
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

fn open_parent(base: &Path, inside: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut directory = openat2(CWD, base, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    for part in inside.parent().into_iter().flat_map(Path::components) {
        make_unless_there(&directory, part.as_os_str())?;
        directory = openat2(&directory, part.as_os_str(), flags, Mode::empty(), BENEATH)?;
    }
    Ok(directory)
}

/// Whether it was not there.
fn make_unless_there(parent: &OwnedFd, name: &OsStr) -> std::io::Result<bool> {
    match mkdirat(parent.as_fd(), name, Mode::from_raw_mode(0o755)) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn write_file(parent: &OwnedFd, name: &OsStr, request: &CopyFileRequest) -> std::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let mut file = File::from(openat2(parent, name, flags, Mode::from_raw_mode(0o600), BENEATH)?);
    file.write_all(&request.data)?;
    give_away(&file, request)
}

fn make_directory(parent: &OwnedFd, name: &OsStr, request: &CopyFileRequest) -> std::io::Result<()> {
    make_unless_there(parent, name)?;
    give_directory_away(parent, name, request)
}

fn make_new_directory(parent: &OwnedFd, name: &OsStr, request: &CopyFileRequest) -> std::io::Result<()> {
    if make_unless_there(parent, name)? { give_directory_away(parent, name, request) } else { Ok(()) }
}

fn make_link(parent: &OwnedFd, name: &OsStr, request: &CopyFileRequest) -> std::io::Result<()> {
    symlinkat(OsStr::from_bytes(&request.data), parent, NEW_LINK)?;
    let (owner, group) = (Some(Uid::from_raw(request.uid)), Some(Gid::from_raw(request.gid)));
    let placed = chownat(parent, NEW_LINK, owner, group, AtFlags::SYMLINK_NOFOLLOW)
        .and_then(|()| renameat(parent, NEW_LINK, parent, name));
    placed.map_err(|error| {
        // The first error is the one to tell.
        let _ = unlinkat(parent, NEW_LINK, AtFlags::empty());
        error.into()
    })
}

fn remove(parent: &OwnedFd, name: &OsStr) -> std::io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        // The library follows no symbolic link in it.
        Err(Errno::ISDIR) => {
            fs::remove_dir_all(Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name))
        }
        Err(error) => Err(error.into()),
    }
}

fn give_directory_away(parent: &OwnedFd, name: &OsStr, request: &CopyFileRequest) -> std::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    give_away(openat2(parent, name, flags, Mode::empty(), BENEATH)?, request)
}

fn give_away(file: impl AsFd, request: &CopyFileRequest) -> std::io::Result<()> {
    fchown(&file, Some(Uid::from_raw(request.uid)), Some(Gid::from_raw(request.gid)))?;
    // Last: a change of owner takes the set-user-id bits away.
    Ok(fchmod(&file, Mode::from_raw_mode(request.mode & 0o7777))?)
}

fn is_plain(path: &Path) -> bool {
    path.file_name().is_some() && path.components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn request(path: &Path, data: &[u8]) -> CopyFileRequest {
        CopyFileRequest {
            path: path.display().to_string(),
            mode: 0o640,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            data: data.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn a_file_is_written_with_its_parents_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundles/web/config.json");
        copy_below(dir.path(), &request(&path, b"long first text")).unwrap();
        copy_below(dir.path(), &request(&path, b"{}")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{}");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    }

    #[test]
    fn a_path_that_leads_out_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("../x"), dir.path().to_owned(), "/etc/passwd".into(), "x".into()] {
            assert!(matches!(copy_below(dir.path(), &request(&path, b"")), Err(Error::Invalid(_))), "{path:?}");
        }
    }

    #[test]
    fn a_symbolic_link_on_the_way_or_at_the_end_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("way")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("end"), dir.path().join("end")).unwrap();
        assert!(copy_below(dir.path(), &request(&dir.path().join("way/file"), b"x")).is_err());
        assert!(copy_below(dir.path(), &request(&dir.path().join("end"), b"x")).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_link_takes_the_place_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shared/web/..data");
        let link = |target: &str| CopyFileRequest {
            kind: FileKind::SYMBOLIC_LINK.into(),
            ..request(&path, target.as_bytes())
        };
        copy_below(dir.path(), &link("..1")).unwrap();
        copy_below(dir.path(), &link("..2")).unwrap();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("..2"));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_keeps_what_is_in_it_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shared/config");
        copy_below(dir.path(), &request(&path.join("deep/file"), b"x")).unwrap();
        let directory = CopyFileRequest { kind: FileKind::DIRECTORY.into(), mode: 0o750, ..request(&path, b"") };
        copy_below(dir.path(), &directory).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o750);
        assert!(path.join("deep/file").is_file());
        let nothing = CopyFileRequest { kind: FileKind::NOTHING.into(), ..request(&path, b"") };
        copy_below(dir.path(), &nothing).unwrap();
        assert!(!path.exists());
        copy_below(dir.path(), &nothing).unwrap();
    }

    #[test]
    fn a_new_directory_leaves_one_that_is_there_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("local/data");
        let new = |mode| CopyFileRequest { kind: FileKind::NEW_DIRECTORY.into(), mode, ..request(&path, b"") };
        copy_below(dir.path(), &new(0o2770)).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o2770);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        copy_below(dir.path(), &new(0o2770)).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o700);
    }

    #[test]
    fn a_link_is_removed_and_not_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("precious"), "data").unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("way")).unwrap();
        let nothing = CopyFileRequest { kind: FileKind::NOTHING.into(), ..request(&dir.path().join("way"), b"") };
        copy_below(dir.path(), &nothing).unwrap();
        assert!(!dir.path().join("way").exists());
        assert!(outside.path().join("precious").exists());
    }

    #[test]
    fn a_file_that_is_too_large_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = copy_below(dir.path(), &request(&dir.path().join("x"), &vec![0; MAX_BYTES + 1])).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)));
    }
}
