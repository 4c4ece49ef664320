//! Writes small files for the host: bundles, and what containers mount from them. Only below one directory, and never
//! through a symbolic link.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path},
};

use caisson_protocol::guest::CopyFileRequest;
use rustix::{
    fs::{CWD, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, mkdirat, openat2},
    io::Errno,
};

use crate::error::{Attempt, Error, Result};

/// The only place where the host writes.
pub const BASE: &str = "/run/caisson";
/// What one file may hold.
const MAX_BYTES: usize = 3 << 20;

/// Writes a whole file below [`BASE`], and makes its parent directories.
///
/// # Errors
/// When the path leads elsewhere, or the file is too large.
pub fn copy(request: &CopyFileRequest) -> Result<()> {
    write_below(Path::new(BASE), request)
}

fn write_below(base: &Path, request: &CopyFileRequest) -> Result<()> {
    let path = &request.path;
    if request.data.len() > MAX_BYTES {
        return Err(Error::Invalid(format!("write {path}: {} bytes are more than {MAX_BYTES}", request.data.len())));
    }
    let inside = Path::new(path).strip_prefix(base).ok().filter(|inside| is_plain(inside));
    let inside = inside
        .ok_or_else(|| Error::Invalid(format!("\"{}\" is no path below {}", path.escape_debug(), base.display())))?;

    let what = || format!("write {path}");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut directory = openat2(CWD, base, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).attempt(what())?;
    for part in inside.parent().into_iter().flat_map(Path::components) {
        directory = enter(&directory, part.as_os_str()).attempt(what())?;
    }
    let name = inside.file_name().unwrap_or_default();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = openat2(&directory, name, flags, Mode::from_raw_mode(0o600), BENEATH).attempt(what())?;
    let mut file = File::from(file);
    file.write_all(&request.data).attempt(what())?;
    fchown(&file, Some(Uid::from_raw(request.uid)), Some(Gid::from_raw(request.gid))).attempt(what())?;
    // Last: a change of owner takes the set-user-id bits away.
    fchmod(&file, Mode::from_raw_mode(request.mode & 0o7777)).attempt(what())
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

fn enter(directory: &OwnedFd, name: &std::ffi::OsStr) -> rustix::io::Result<OwnedFd> {
    match mkdirat(directory.as_fd(), name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    openat2(directory, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), BENEATH)
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
        write_below(dir.path(), &request(&path, b"long first text")).unwrap();
        write_below(dir.path(), &request(&path, b"{}")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{}");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    }

    #[test]
    fn a_path_that_leads_out_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("../x"), dir.path().to_owned(), "/etc/passwd".into(), "x".into()] {
            assert!(matches!(write_below(dir.path(), &request(&path, b"")), Err(Error::Invalid(_))), "{path:?}");
        }
    }

    #[test]
    fn a_symbolic_link_on_the_way_or_at_the_end_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("way")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("end"), dir.path().join("end")).unwrap();
        assert!(write_below(dir.path(), &request(&dir.path().join("way/file"), b"x")).is_err());
        assert!(write_below(dir.path(), &request(&dir.path().join("end"), b"x")).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_is_too_large_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_below(dir.path(), &request(&dir.path().join("x"), &vec![0; MAX_BYTES + 1])).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)));
    }
}
