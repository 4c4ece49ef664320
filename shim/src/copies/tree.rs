//! A small file or folder of the host as it is now, and what has to be done to a copy of how it was.

use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use caisson_protocol::guest::{CopyFileRequest, FileKind};

/// What one mount may hold: files, folders and links.
pub const MAX_ENTRIES: usize = 256;
/// What one file may hold.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// What all files of a mount may hold together.
pub const MAX_BYTES: u64 = 4 << 20;

/// Everything at and below a path, by the path relative to it; the path itself has the empty one.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, Node>);

/// What distinguishes one state of a file from another without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    /// Any write changes the last: seconds and nanoseconds.
    File {
        inode: u64,
        bytes: u64,
        changed: (i64, i64),
    },
    Link(PathBuf),
}

/// Why something cannot be copied.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// More than the limits allow, or of a kind that has no copy.
    #[error("{0}")]
    Unfit(String),
    /// It cannot be read.
    #[error("read {path}")]
    Unreadable {
        /// Of the host.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

impl Tree {
    /// Reads what is at `source`. Calls `visit` for each folder before it looks into it, and for `source` itself.
    pub fn read(source: &Path, mut visit: impl FnMut(&Path) -> io::Result<()>) -> Result<Self, Refusal> {
        let mut tree = Self::default();
        let mut bytes = 0;
        tree.add(source, PathBuf::new(), &mut bytes, &mut visit)?;
        Ok(tree)
    }

    fn add(
        &mut self,
        source: &Path,
        relative: PathBuf,
        bytes: &mut u64,
        visit: &mut impl FnMut(&Path) -> io::Result<()>,
    ) -> Result<(), Refusal> {
        let path = join(source, &relative);
        let unreadable = |source| Refusal::Unreadable { path: path.clone(), source };
        if self.0.len() == MAX_ENTRIES {
            return Err(Refusal::Unfit(format!("it holds more than {MAX_ENTRIES} files, folders and links")));
        }
        if relative.as_os_str().is_empty() {
            visit(&path).map_err(unreadable)?;
        }
        let metadata = fs::symlink_metadata(&path).map_err(unreadable)?;
        let kind = kind(&path, &metadata)?;
        if let Kind::File { bytes: own, .. } = &kind {
            *bytes += own;
            if *bytes > MAX_BYTES {
                return Err(Refusal::Unfit(format!("its files hold more than {} MiB together", MAX_BYTES >> 20)));
            }
        }
        let is_directory = kind == Kind::Directory;
        let node = Node { kind, mode: metadata.mode() & 0o7777, uid: metadata.uid(), gid: metadata.gid() };
        self.0.insert(relative.clone(), node);
        if is_directory {
            if !relative.as_os_str().is_empty() {
                visit(&path).map_err(unreadable)?;
            }
            for entry in fs::read_dir(&path).map_err(unreadable)? {
                let name = entry.map_err(unreadable)?.file_name();
                match self.add(source, relative.join(name), bytes, visit) {
                    // Removed since it was listed; the folder tells of that too.
                    Err(Refusal::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                    added => added?,
                }
            }
        }
        Ok(())
    }

    /// Whether it is one file.
    pub fn is_file(&self) -> bool {
        matches!(self.0.get(Path::new("")), Some(Node { kind: Kind::File { .. }, .. }))
    }

    /// Whether it is a folder with nothing in it.
    pub fn is_empty_directory(&self) -> bool {
        self.0.len() == 1 && matches!(self.0.get(Path::new("")), Some(Node { kind: Kind::Directory, .. }))
    }

    /// What makes a copy of `old` below `target` one of this tree. A link is changed when what it leads to is there,
    /// and nothing is removed before that.
    pub fn changes_from(&self, old: &Self, source: &Path, target: &str) -> Result<Vec<CopyFileRequest>, Refusal> {
        let at = |relative: &Path| join(Path::new(target), relative).to_string_lossy().into_owned();
        let (mut first, mut files, mut links, mut last) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (relative, node) in &self.0 {
            let before = old.0.get(relative);
            if before == Some(node) {
                continue;
            }
            if before.is_some_and(|before| !same_kind(&before.kind, &node.kind)) {
                first.push(nothing(at(relative)));
            }
            let request = node.request(&join(source, relative), at(relative))?;
            if matches!(node.kind, Kind::Link(_)) { links.push(request) } else { files.push(request) }
        }
        for relative in old.0.keys().filter(|relative| !self.0.contains_key(*relative)) {
            let goes_with_parent = relative.parent().is_some_and(|parent| !self.0.contains_key(parent));
            if !goes_with_parent {
                last.push(nothing(at(relative)));
            }
        }
        Ok([first, files, links, last].concat())
    }
}

impl Node {
    fn request(&self, source: &Path, path: String) -> Result<CopyFileRequest, Refusal> {
        let (kind, data) = match &self.kind {
            Kind::Directory => (FileKind::DIRECTORY, Vec::new()),
            Kind::File { .. } => (FileKind::REGULAR_FILE, content(source)?),
            Kind::Link(target) => (FileKind::SYMBOLIC_LINK, target.as_os_str().as_bytes().to_vec()),
        };
        let (mode, uid, gid) = (self.mode, self.uid, self.gid);
        Ok(CopyFileRequest { path, mode, uid, gid, data, kind: kind.into(), ..Default::default() })
    }
}

fn kind(path: &Path, metadata: &Metadata) -> Result<Kind, Refusal> {
    let is = |what: &str| Err(Refusal::Unfit(format!("{} is a {what}", path.display())));
    let file_type = metadata.file_type();
    if file_type.is_dir() {
        Ok(Kind::Directory)
    } else if file_type.is_symlink() {
        let target = fs::read_link(path).map_err(|source| Refusal::Unreadable { path: path.to_owned(), source })?;
        Ok(Kind::Link(target))
    } else if file_type.is_socket() {
        is("socket")
    } else if file_type.is_fifo() {
        is("pipe")
    } else if !file_type.is_file() {
        is("device")
    } else if metadata.len() > MAX_FILE_BYTES {
        Err(too_large(path))
    } else {
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Ok(Kind::File { inode: metadata.ino(), bytes: metadata.len(), changed })
    }
}

fn content(path: &Path) -> Result<Vec<u8>, Refusal> {
    let mut data = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut data));
    match read {
        Ok(bytes) if bytes as u64 > MAX_FILE_BYTES => Err(too_large(path)),
        Ok(_) => Ok(data),
        Err(source) => Err(Refusal::Unreadable { path: path.to_owned(), source }),
    }
}

fn too_large(path: &Path) -> Refusal {
    Refusal::Unfit(format!("{} holds more than {} MiB", path.display(), MAX_FILE_BYTES >> 20))
}

fn nothing(path: String) -> CopyFileRequest {
    CopyFileRequest { path, kind: FileKind::NOTHING.into(), ..Default::default() }
}

fn same_kind(one: &Kind, other: &Kind) -> bool {
    std::mem::discriminant(one) == std::mem::discriminant(other)
}

/// `directory` itself for the empty path, without the slash that joining would add.
fn join(directory: &Path, relative: &Path) -> PathBuf {
    if relative.as_os_str().is_empty() { directory.to_owned() } else { directory.join(relative) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    };

    const TARGET: &str = "/run/caisson/shared/web/mounts/0";

    fn read(source: &Path) -> Tree {
        Tree::read(source, |_| Ok(())).unwrap()
    }

    fn refusal(source: &Path) -> String {
        Tree::read(source, |_| Ok(())).unwrap_err().to_string()
    }

    /// `kind path`, in order.
    fn steps(new: &Tree, old: &Tree, source: &Path) -> Vec<String> {
        let changes = new.changes_from(old, source, TARGET).unwrap();
        let name = |request: &CopyFileRequest| {
            let kind = match request.kind.unwrap() {
                FileKind::REGULAR_FILE => "file",
                FileKind::DIRECTORY => "folder",
                FileKind::SYMBOLIC_LINK => "link",
                FileKind::NOTHING => "nothing",
            };
            format!("{kind} {}", request.path.strip_prefix(TARGET).unwrap())
        };
        changes.iter().map(name).collect()
    }

    /// As the kubelet writes a ConfigMap.
    fn write_atomically(volume: &Path, version: &str, text: &str) {
        let directory = volume.join(version);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("key"), text).unwrap();
        symlink(version, volume.join("..new")).unwrap();
        fs::rename(volume.join("..new"), volume.join("..data")).unwrap();
    }

    #[test]
    fn a_single_file_keeps_mode_and_content() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        fs::write(&file, "nameserver 192.0.2.1\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let changes = read(&file).changes_from(&Tree::default(), &file, TARGET).unwrap();
        let [request] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!((request.path.as_str(), request.mode), (TARGET, 0o640));
        assert_eq!(request.data, b"nameserver 192.0.2.1\n");
    }

    #[test]
    fn an_atomic_writers_link_turns_after_what_it_leads_to_and_before_the_old_goes() {
        let dir = tempfile::tempdir().unwrap();
        write_atomically(dir.path(), "..1", "one");
        symlink("..data/key", dir.path().join("key")).unwrap();
        let old = read(dir.path());
        assert_eq!(
            steps(&old, &Tree::default(), dir.path()),
            ["folder ", "folder /..1", "file /..1/key", "link /..data", "link /key"]
        );
        write_atomically(dir.path(), "..2", "two");
        fs::remove_dir_all(dir.path().join("..1")).unwrap();
        assert_eq!(
            steps(&read(dir.path()), &old, dir.path()),
            ["folder /..2", "file /..2/key", "link /..data", "nothing /..1"]
        );
    }

    #[test]
    fn what_did_not_change_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("same"), "x").unwrap();
        fs::write(dir.path().join("other"), "x").unwrap();
        let old = read(dir.path());
        fs::write(dir.path().join("other"), "longer").unwrap();
        assert_eq!(steps(&read(dir.path()), &old, dir.path()), ["file /other"]);
    }

    #[test]
    fn a_file_that_becomes_a_folder_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x"), "x").unwrap();
        let old = read(dir.path());
        fs::remove_file(dir.path().join("x")).unwrap();
        fs::create_dir(dir.path().join("x")).unwrap();
        assert_eq!(steps(&read(dir.path()), &old, dir.path()), ["nothing /x", "folder /x"]);
    }

    #[test]
    fn a_large_file_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("large");
        File::create(&file).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
        assert_eq!(refusal(dir.path()), format!("{} holds more than 1 MiB", file.display()));
    }

    #[test]
    fn many_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..MAX_ENTRIES {
            fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        assert_eq!(refusal(dir.path()), "it holds more than 256 files, folders and links");
    }

    #[test]
    fn much_together_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..5 {
            File::create(dir.path().join(number.to_string())).unwrap().set_len(MAX_FILE_BYTES).unwrap();
        }
        assert_eq!(refusal(dir.path()), "its files hold more than 4 MiB together");
    }

    #[test]
    fn a_socket_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("docker.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(refusal(dir.path()), format!("{} is a socket", socket.display()));
    }
}
