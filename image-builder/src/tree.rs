//! The files of a guest's root, as a list in memory: written as a cpio archive or into a directory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};

use crate::error::{Error, Result};

/// Files by their path, without a leading slash.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    entries: BTreeMap<String, Node>,
}

#[derive(Clone, Debug)]
enum Node {
    Directory { mode: u32 },
    File { mode: u32, content: Content },
    Symlink { target: String },
    CharDevice { mode: u32, major: u32, minor: u32 },
}

/// What is in a file.
#[derive(Clone, Debug)]
pub enum Content {
    /// These bytes.
    Bytes(Vec<u8>),
    /// The bytes of this file.
    Copy(PathBuf),
}

impl Content {
    fn read(&self) -> Result<Vec<u8>> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            Self::Copy(path) => fs::read(path).map_err(Error::file("read", path)),
        }
    }
}

impl Tree {
    /// Adds a directory, and those above it.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.parents(path);
        self.entries.insert(path.to_owned(), Node::Directory { mode });
    }

    /// Adds a file, and the directories above it.
    pub fn file(&mut self, path: &str, mode: u32, content: Content) {
        self.parents(path);
        self.entries.insert(path.to_owned(), Node::File { mode, content });
    }

    /// Adds a symbolic link, and the directories above it.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entries.insert(path.to_owned(), Node::Symlink { target: target.to_owned() });
    }

    /// Adds a character device, and the directories above it.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.parents(path);
        self.entries.insert(path.to_owned(), Node::CharDevice { mode, major, minor });
    }

    fn parents(&mut self, path: &str) {
        for (index, _) in path.match_indices('/') {
            self.entries.entry(path[..index].to_owned()).or_insert(Node::Directory { mode: 0o755 });
        }
    }

    /// Writes a cpio archive (newc), owned by root, at time zero. The map's order puts directories before their content.
    pub fn write_cpio<W: Write>(&self, archive: W) -> Result<W> {
        let write = Error::file("write", Path::new("initrd.img"));
        let mut archive = archive;
        for (index, (path, node)) in self.entries.iter().enumerate() {
            let entry = Builder::new(path).ino(index as u32 + 1);
            let (entry, content) = match node {
                Node::Directory { mode } => {
                    (entry.mode(*mode).nlink(2).set_mode_file_type(ModeFileType::Directory), Vec::new())
                }
                Node::File { mode, content } => {
                    (entry.mode(*mode).set_mode_file_type(ModeFileType::Regular), content.read()?)
                }
                Node::Symlink { target } => {
                    (entry.mode(0o777).set_mode_file_type(ModeFileType::Symlink), target.clone().into_bytes())
                }
                Node::CharDevice { mode, major, minor } => {
                    let entry = entry.mode(*mode).rdev_major(*major).rdev_minor(*minor);
                    (entry.set_mode_file_type(ModeFileType::Char), Vec::new())
                }
            };
            match append(archive, entry, &content) {
                Ok(next) => archive = next,
                Err(error) => return Err(write(error)),
            }
        }
        trailer(archive).map_err(write)
    }

    /// Writes into a directory, over what is there. Device nodes need root.
    pub fn write_directory(&self, root: &Path) -> Result<()> {
        for (path, node) in &self.entries {
            let path = root.join(path);
            match node {
                Node::Directory { mode } => {
                    fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
                    set_mode(&path, *mode)?;
                }
                Node::File { mode, content } => {
                    remove_old(&path)?;
                    fs::write(&path, content.read()?).map_err(Error::file("write", &path))?;
                    set_mode(&path, *mode)?;
                }
                Node::Symlink { target } => {
                    remove_old(&path)?;
                    symlink(target, &path).map_err(Error::file("create", &path))?;
                }
                Node::CharDevice { mode, major, minor } => {
                    remove_old(&path)?;
                    make_device(&path, *mode, *major, *minor)?;
                }
            }
        }
        Ok(())
    }
}

fn append<W: Write>(archive: W, entry: Builder, content: &[u8]) -> io::Result<W> {
    let size = u32::try_from(content.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    let mut writer = entry.write(archive, size);
    writer.write_all(content)?;
    writer.finish()
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::file("set the mode of", path))
}

fn remove_old(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("replace", path)(error)),
        _ => Ok(()),
    }
}

fn make_device(path: &Path, mode: u32, major: u32, minor: u32) -> Result<()> {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    mknodat(CWD, path, FileType::CharacterDevice, Mode::from_raw_mode(mode), makedev(major, minor))
        .map_err(|error| Error::file("create the device node (as root)", path)(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_above_an_entry_are_added_before_it() {
        let mut tree = Tree::default();
        tree.file("lib/modules/order", 0o644, Content::Bytes(Vec::new()));
        assert_eq!(tree.entries.keys().collect::<Vec<_>>(), ["lib", "lib/modules", "lib/modules/order"]);
    }

    #[test]
    fn an_archive_reads_back_as_it_was_described() {
        let mut tree = Tree::default();
        tree.char_device("dev/console", 0o600, 5, 1);
        tree.file("init", 0o755, Content::Bytes(b"#!/agent".to_vec()));
        let archive = tree.write_cpio(Vec::new()).unwrap();
        let mut input = archive.as_slice();
        let mut seen = Vec::new();
        loop {
            let reader = cpio::newc::Reader::new(input).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            seen.push((entry.name().to_owned(), entry.mode(), entry.rdev_major(), entry.rdev_minor(), entry.mtime()));
            input = reader.finish().unwrap();
        }
        let expected = [
            ("dev".to_owned(), 0o040_755, 0, 0, 0),
            ("dev/console".to_owned(), 0o020_600, 5, 1, 0),
            ("init".to_owned(), 0o100_755, 0, 0, 0),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_missing_source_file_is_named() {
        let mut tree = Tree::default();
        tree.file("init", 0o755, Content::Copy("/nonexistent/agent".into()));
        assert!(tree.write_cpio(Vec::new()).unwrap_err().to_string().starts_with("cannot read /nonexistent/agent: "));
    }
}
