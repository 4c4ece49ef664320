//! A small file or folder of the host as it is now, and what has to be done to a copy of how it was.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, Metadata},
    io::{self, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{FileTypeExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use caisson_protocol::guest::{CopyFileRequest, FileKind};
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat2, readlinkat},
    io::Errno,
};
use sha2::{Digest, Sha256};

/// What one mount may hold: files, folders and links.
pub const MAX_ENTRIES: usize = 256;
/// What one file may hold.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// What all files of a mount may hold together.
pub const MAX_BYTES: u64 = 4 << 20;

/// A file or folder of the host, open for one look at it and the reading after that. Everything is found through the folder
/// that it was in, and never through a symbolic link: this process is root, and whoever may write there may not be.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    parent: OwnedFd,
    name: PathBuf,
}

/// Everything at and below a path, by the path relative to it; the path itself has the empty one.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, Node>);

/// What distinguishes one state of a file from another.
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
    /// The content's digest once it was read. Neither size nor time tell of each write: time has only ticks.
    File(Option<[u8; 32]>),
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

impl Source {
    /// `path` has no symbolic link in it, as [`fs::canonicalize`] gives it.
    pub fn open(path: &Path) -> Result<Self, Refusal> {
        let (parent, name) = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => (parent, Path::new(name)),
            _ => (path, Path::new(".")),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = openat2(CWD, parent, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
            .map_err(|error| Refusal::Unreadable { path: path.to_owned(), source: error.into() })?;
        Ok(Self { path: path.to_owned(), parent, name: name.to_owned() })
    }

    /// What is at `relative` now, a link as it is: to look at, not to read. No pipe or device takes notice.
    fn look(&self, relative: &Path) -> io::Result<File> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(openat2(&self.parent, join(&self.name, relative), flags, Mode::empty(), beneath)?.into())
    }

    /// The content of the file at `relative`; `None` when it is there no more, or something else is.
    fn content(&self, relative: &Path) -> Result<Option<Vec<u8>>, Refusal> {
        let read = || {
            let entry = self.look(relative)?;
            if !entry.metadata()?.is_file() {
                return Ok(None);
            }
            let mut data = Vec::new();
            File::open(by_descriptor(&entry))?.take(MAX_FILE_BYTES + 1).read_to_end(&mut data)?;
            Ok(Some(data))
        };
        let path = join(&self.path, relative);
        match read() {
            Ok(Some(data)) if data.len() as u64 > MAX_FILE_BYTES => Err(too_large(&path)),
            Ok(data) => Ok(data),
            Err(error) if is_gone(&error) => Ok(None),
            Err(source) => Err(Refusal::Unreadable { path, source }),
        }
    }
}

impl Tree {
    /// Looks at what is at `source`; what files hold is read for [`Self::changes_from`]. Calls `visit` for each folder before
    /// it looks into it, and for `source` itself.
    pub fn read(source: &Source, mut visit: impl FnMut(&Path) -> io::Result<()>) -> Result<Self, Refusal> {
        let mut tree = Self::default();
        let mut bytes = 0;
        tree.add(source, PathBuf::new(), &mut bytes, &mut visit)?;
        Ok(tree)
    }

    fn add(
        &mut self,
        source: &Source,
        relative: PathBuf,
        bytes: &mut u64,
        visit: &mut impl FnMut(&Path) -> io::Result<()>,
    ) -> Result<(), Refusal> {
        let path = join(&source.path, &relative);
        let unreadable = |source| Refusal::Unreadable { path: path.clone(), source };
        if self.0.len() == MAX_ENTRIES {
            return Err(Refusal::Unfit(format!("it holds more than {MAX_ENTRIES} files, folders and links")));
        }
        if relative.as_os_str().is_empty() {
            visit(&path).map_err(unreadable)?;
        }
        let entry = source.look(&relative).map_err(unreadable)?;
        let metadata = entry.metadata().map_err(unreadable)?;
        let kind = kind(&entry, &metadata, &path)?;
        if metadata.is_file() {
            *bytes += metadata.len();
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
            for listed in fs::read_dir(by_descriptor(&entry)).map_err(unreadable)? {
                let name = listed.map_err(unreadable)?.file_name();
                match self.add(source, relative.join(name), bytes, visit) {
                    // Since it was listed; the folder tells of that too.
                    Err(Refusal::Unreadable { source, .. }) if is_gone(&source) => {}
                    added => added?,
                }
            }
        }
        Ok(())
    }

    /// Whether it is one file.
    pub fn is_file(&self) -> bool {
        matches!(self.0.get(Path::new("")), Some(Node { kind: Kind::File(_), .. }))
    }

    /// What makes a folder like it at `path` where there is none yet; `None` unless it is a folder with nothing in it.
    pub fn new_directory(&self, path: String) -> Option<CopyFileRequest> {
        let root = self.0.get(Path::new("")).filter(|root| root.kind == Kind::Directory && self.0.len() == 1)?;
        Some(CopyFileRequest { kind: FileKind::NEW_DIRECTORY.into(), ..root.request(path, Vec::new()) })
    }

    /// What makes a copy of `old` below `target` one of this tree, which was read from `source`. A link is changed when
    /// what it leads to is there, and nothing is removed before that. A file whose name something else has taken since is
    /// left out: the folder tells of that.
    pub fn changes_from(&mut self, old: &Self, source: &Source, target: &str) -> Result<Vec<CopyFileRequest>, Refusal> {
        let at = |relative: &Path| join(Path::new(target), relative).to_string_lossy().into_owned();
        let (mut first, mut files, mut links, mut last) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (relative, node) in &mut self.0 {
            let before = old.0.get(relative);
            let data = match &mut node.kind {
                Kind::Directory => Some(Vec::new()),
                Kind::Link(target) => Some(target.as_os_str().as_bytes().to_vec()),
                Kind::File(digest) => {
                    let content = source.content(relative)?;
                    *digest = content.as_ref().map(|content| Sha256::digest(content).into());
                    content
                }
            };
            if before == Some(node) {
                continue;
            }
            if before.is_some_and(|before| !same_kind(&before.kind, &node.kind)) {
                first.push(nothing(at(relative)));
            }
            let request = data.map(|data| node.request(at(relative), data));
            if matches!(node.kind, Kind::Link(_)) { links.extend(request) } else { files.extend(request) }
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
    fn request(&self, path: String, data: Vec<u8>) -> CopyFileRequest {
        let kind = match &self.kind {
            Kind::Directory => FileKind::DIRECTORY,
            Kind::File(_) => FileKind::REGULAR_FILE,
            Kind::Link(_) => FileKind::SYMBOLIC_LINK,
        };
        let (mode, uid, gid) = (self.mode, self.uid, self.gid);
        CopyFileRequest { path, mode, uid, gid, data, kind: kind.into(), ..Default::default() }
    }
}

fn kind(entry: &File, metadata: &Metadata, path: &Path) -> Result<Kind, Refusal> {
    let is = |what: &str| Err(Refusal::Unfit(format!("{} is a {what}", path.display())));
    let file_type = metadata.file_type();
    if file_type.is_dir() {
        Ok(Kind::Directory)
    } else if file_type.is_symlink() {
        let target = readlinkat(entry, "", Vec::new());
        let target = target.map_err(|error| Refusal::Unreadable { path: path.to_owned(), source: error.into() })?;
        Ok(Kind::Link(OsString::from_vec(target.into_bytes()).into()))
    } else if file_type.is_socket() {
        is("socket")
    } else if file_type.is_fifo() {
        is("pipe")
    } else if !file_type.is_file() {
        is("device")
    } else if metadata.len() > MAX_FILE_BYTES {
        Err(too_large(path))
    } else {
        Ok(Kind::File(None))
    }
}

/// The same file or folder for functions that open by name.
fn by_descriptor(entry: &File) -> PathBuf {
    format!("/proc/self/fd/{}", entry.as_raw_fd()).into()
}

/// Whether the error says that the path is not, or no longer, one of files and folders.
fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP))
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

    use nix::{sys::stat::Mode, unistd::mkfifo};

    const TARGET: &str = "/run/caisson/shared/web/mounts/0";

    fn open(path: &Path) -> Source {
        Source::open(path).unwrap()
    }

    fn look(source: &Source) -> Tree {
        Tree::read(source, |_| Ok(())).unwrap()
    }

    fn read(path: &Path) -> Tree {
        look(&open(path))
    }

    fn refusal(path: &Path) -> String {
        Tree::read(&open(path), |_| Ok(())).unwrap_err().to_string()
    }

    fn steps(new: &mut Tree, old: &Tree, path: &Path) -> Vec<String> {
        steps_at(new, old, &open(path))
    }

    /// `kind path`, in order.
    fn steps_at(new: &mut Tree, old: &Tree, source: &Source) -> Vec<String> {
        let changes = new.changes_from(old, source, TARGET).unwrap();
        let name = |request: &CopyFileRequest| {
            let kind = match request.kind.unwrap() {
                FileKind::REGULAR_FILE => "file",
                FileKind::DIRECTORY => "folder",
                FileKind::NEW_DIRECTORY => "new folder",
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
        let changes = read(&file).changes_from(&Tree::default(), &open(&file), TARGET).unwrap();
        let [request] = &changes[..] else { panic!("{changes:?}") };
        assert_eq!((request.path.as_str(), request.mode), (TARGET, 0o640));
        assert_eq!(request.data, b"nameserver 192.0.2.1\n");
    }

    #[test]
    fn an_atomic_writers_link_turns_after_what_it_leads_to_and_before_the_old_goes() {
        let dir = tempfile::tempdir().unwrap();
        write_atomically(dir.path(), "..1", "one");
        symlink("..data/key", dir.path().join("key")).unwrap();
        let mut old = read(dir.path());
        assert_eq!(
            steps(&mut old, &Tree::default(), dir.path()),
            ["folder ", "folder /..1", "file /..1/key", "link /..data", "link /key"]
        );
        write_atomically(dir.path(), "..2", "two");
        fs::remove_dir_all(dir.path().join("..1")).unwrap();
        assert_eq!(
            steps(&mut read(dir.path()), &old, dir.path()),
            ["folder /..2", "file /..2/key", "link /..data", "nothing /..1"]
        );
    }

    #[test]
    fn what_did_not_change_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("same"), "x").unwrap();
        fs::write(dir.path().join("other"), "x").unwrap();
        let mut old = read(dir.path());
        steps(&mut old, &Tree::default(), dir.path());
        fs::write(dir.path().join("other"), "longer").unwrap();
        assert_eq!(steps(&mut read(dir.path()), &old, dir.path()), ["file /other"]);
    }

    #[test]
    fn what_changes_within_a_tick_is_sent_and_what_is_written_as_it_was_is_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        let mut old = Tree::default();
        for (text, expected) in [("x", vec!["folder ", "file /file"]), ("y", vec!["file /file"]), ("y", vec![])] {
            fs::write(dir.path().join("file"), text).unwrap();
            let mut new = read(dir.path());
            assert_eq!(steps(&mut new, &old, dir.path()), expected);
            old = new;
        }
    }

    /// What is sent when `swap` puts something else in place of the file `inner/key` after the look, and at the next look,
    /// when the file is back.
    fn steps_with(swap: impl Fn(&Path)) -> [Vec<String>; 2] {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("key"), "x").unwrap();
        let source = open(dir.path());
        let mut tree = look(&source);
        fs::rename(&inner, dir.path().join("away")).unwrap();
        fs::create_dir(&inner).unwrap();
        swap(&inner);
        let during = steps_at(&mut tree, &Tree::default(), &source);
        fs::remove_dir_all(&inner).or_else(|_| fs::remove_file(&inner)).unwrap();
        fs::rename(dir.path().join("away"), &inner).unwrap();
        [during, steps(&mut read(dir.path()), &tree, dir.path())]
    }

    fn without_and_then_with_the_file() -> [Vec<String>; 2] {
        [vec!["folder ".into(), "folder /inner".into()], vec!["file /inner/key".into()]]
    }

    #[test]
    fn a_link_that_takes_a_files_name_after_the_look_is_not_followed() {
        let steps = steps_with(|inner| symlink("/etc/passwd", inner.join("key")).unwrap());
        assert_eq!(steps, without_and_then_with_the_file());
    }

    #[test]
    fn a_link_that_takes_a_folders_name_after_the_look_is_not_followed() {
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("key"), "secret").unwrap();
        let steps = steps_with(|inner| {
            fs::remove_dir(inner).unwrap();
            symlink(elsewhere.path(), inner).unwrap();
        });
        assert_eq!(steps, without_and_then_with_the_file());
    }

    #[test]
    fn a_link_that_takes_the_name_of_the_source_is_not_followed() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let source = open(&file);
        let mut tree = look(&source);
        fs::remove_file(&file).unwrap();
        symlink(elsewhere.path(), &file).unwrap();
        assert_eq!(steps_at(&mut tree, &Tree::default(), &source), Vec::<String>::new());
    }

    #[test]
    fn a_pipe_that_takes_a_files_name_after_the_look_is_not_waited_for() {
        let steps = steps_with(|inner| mkfifo(&inner.join("key"), Mode::from_bits_truncate(0o600)).unwrap());
        assert_eq!(steps, without_and_then_with_the_file());
    }

    #[test]
    fn a_file_that_becomes_a_folder_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x"), "x").unwrap();
        let old = read(dir.path());
        fs::remove_file(dir.path().join("x")).unwrap();
        fs::create_dir(dir.path().join("x")).unwrap();
        assert_eq!(steps(&mut read(dir.path()), &old, dir.path()), ["nothing /x", "folder /x"]);
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
