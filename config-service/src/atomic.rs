//! Files and links that change in one step: whoever looks sees the new state or the old one, also after a SIGKILL.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// Makes `path` a file of these `bytes`.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = unfinished(path)?;
    // Not through a link that somebody put there.
    File::create_new(&unfinished)?.write_all(bytes)?;
    fs::rename(unfinished, path)
}

/// Makes `path` a symbolic link to `target`.
pub(crate) fn link(path: &Path, target: &Path) -> io::Result<()> {
    let unfinished = unfinished(path)?;
    symlink(target, &unfinished)?;
    fs::rename(unfinished, path)
}

/// A name beside `path`, always the same, so that what a killed process left is not left for ever.
fn unfinished(path: &Path) -> io::Result<PathBuf> {
    let unfinished = path.with_added_extension("new");
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(unfinished),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_link_left_behind_names_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let (file, other) = (dir.path().join("file"), dir.path().join("other"));
        fs::write(&other, "precious").unwrap();
        symlink(&other, dir.path().join("file.new")).unwrap();
        write(&file, b"new").unwrap();
        assert_eq!((fs::read(&file).unwrap(), fs::read(&other).unwrap()), (b"new".to_vec(), b"precious".to_vec()));
    }

    #[test]
    fn a_link_replaces_a_link_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        link(&path, Path::new("a")).unwrap();
        symlink("/nothing", dir.path().join("link.new")).unwrap();
        link(&path, Path::new("b")).unwrap();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("b"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
