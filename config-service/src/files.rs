//! Whether a path names what a key needs.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

/// What has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A regular file or a block device.
    File,
    /// A regular file that may be executed.
    Program,
}

/// `Ok`, or what is wrong with `path`, as the end of a sentence.
pub(crate) fn examine(path: &Path, wanted: Wanted) -> Result<(), String> {
    use std::os::unix::fs::FileTypeExt;
    if !path.is_absolute() {
        return Err("is not an absolute path".to_owned());
    }
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err("does not exist".to_owned()),
        Err(error) => return Err(format!("cannot be looked at: {error}")),
    };
    match wanted {
        Wanted::File if metadata.is_file() || metadata.file_type().is_block_device() => Ok(()),
        Wanted::Program if !metadata.is_file() => Err("is not a file".to_owned()),
        Wanted::Program if metadata.permissions().mode() & 0o111 == 0 => Err("is not executable".to_owned()),
        Wanted::Program => Ok(()),
        Wanted::File => Err("is not a file".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_is_a_program() {
        assert_eq!(examine(Path::new("/bin/sh"), Wanted::Program), Ok(()));
    }

    #[test]
    fn a_text_is_a_file_and_no_program() {
        assert_eq!(examine(Path::new("/etc/passwd"), Wanted::File), Ok(()));
        assert_eq!(examine(Path::new("/etc/passwd"), Wanted::Program).unwrap_err(), "is not executable");
    }

    #[test]
    fn a_directory_is_neither() {
        assert_eq!(examine(Path::new("/etc"), Wanted::File).unwrap_err(), "is not a file");
        assert_eq!(examine(Path::new("/etc"), Wanted::Program).unwrap_err(), "is not a file");
    }

    #[test]
    fn a_relative_path_is_refused() {
        assert_eq!(examine(Path::new("vmlinux"), Wanted::File).unwrap_err(), "is not an absolute path");
    }
}
