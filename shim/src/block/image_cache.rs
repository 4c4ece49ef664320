//! Images that are made once and used by every sandbox of the host.
//!
//! ```text
//! <cache>/<name>                  an image that is whole; who uses it holds a shared lock on it
//! <cache>/<name>.part/            where one is being made; its maker holds a lock on the directory
//! <cache>/sandboxes/<name>-<pid>/ what one sandbox has for itself; it holds a lock on the directory
//! ```
//! An image gets its name in one step when it is on the disk. Whatever nobody holds a lock on was left by a process that
//! was killed, or is kept only for the next user: when the directory has grown beyond its limit, the images whose last
//! use was longest ago go, and when there is no room for a new one, all of them. What has another name than images have
//! ([`is_image`]) is somebody else's and stays.

use std::{
    fs::{self, DirBuilder, DirEntry, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use caisson_protocol::status::sentence;
use tokio::task::spawn_blocking;
use tracing::warn;

use crate::{
    Error, Result,
    block::{
        images::NAME_BYTES,
        locks::{Lock, lock, lock_unless_used},
    },
};

const UNFINISHED: &str = "part";
const SANDBOXES: &str = "sandboxes";

/// The directory, as one process uses it.
#[derive(Clone, Debug)]
pub struct ImageCache {
    directory: PathBuf,
    limit_bytes: u64,
}

/// Where an image is being made; removed with the value, also when its maker fails or is wanted no more.
struct Part {
    directory: PathBuf,
    _lock: File,
}

/// An image in use: it stays as long as this value.
#[derive(Debug)]
pub struct Image {
    /// Read-only for everybody.
    pub path: PathBuf,
    _lock: File,
}

/// A sandbox's own directory in the cache. Whoever removes the sandbox removes it, with [`remove_directory`]; should nobody
/// do so, it goes when the cache is next tidied once this value is dropped.
#[derive(Debug)]
pub struct OwnDirectory {
    /// For root only.
    pub path: PathBuf,
    _lock: File,
}

impl ImageCache {
    /// The cache at `directory`, which is made when it is needed.
    pub fn new(directory: PathBuf, limit_bytes: u64) -> Self {
        Self { directory, limit_bytes }
    }

    /// The image `name`. Unless it is there, `make` makes it at the path that it is given; of several callers, also in
    /// other processes, one does and the others wait.
    pub async fn get<F>(&self, name: &str, make: impl Fn(PathBuf) -> F) -> Result<Arc<Image>>
    where
        F: Future<Output = Result<()>>,
    {
        let path = self.directory.join(name);
        let action = || format!("use the image {}", path.display());
        loop {
            if let Some(lock) = open_locked(&path, Lock::Shared).await.map_err(Error::host(action()))? {
                lock.set_modified(SystemTime::now()).map_err(Error::host(action()))?;
                return Ok(Arc::new(Image { path, _lock: lock }));
            }
            if let Some(lock) = self.with_room(|| self.make(&path, &make)).await? {
                return Ok(Arc::new(Image { path, _lock: lock }));
            }
        }
    }

    /// What `make` makes; when it finds no room for that, once more without the images that nobody uses.
    pub async fn with_room<T, F>(&self, make: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        match make().await {
            Err(error) if is_want_of_room(&error) => {
                warn!(error = %sentence(&error), "images that nobody uses are removed");
                self.shrink_to(0).await;
                make().await
            }
            made => made,
        }
    }

    /// Removes what was left by the dead, and what is too much.
    pub async fn tidy(&self) {
        self.shrink_to(self.limit_bytes).await;
    }

    /// The directory that a sandbox has for itself; nobody else uses this `name`, which ends with the process.
    pub async fn own_directory(&self, name: &str) -> Result<OwnDirectory> {
        let path = self.own_path(name);
        let action = || format!("lock {}", path.display());
        loop {
            make_directory(&path)?;
            // Until it is locked, it may be taken for one that a killed sandbox has left.
            if let Some(lock) = open_locked(&path, Lock::Exclusive).await.map_err(Error::host(action()))? {
                return Ok(OwnDirectory { path, _lock: lock });
            }
        }
    }

    /// Where [`Self::own_directory`] is.
    pub fn own_path(&self, name: &str) -> PathBuf {
        self.directory.join(SANDBOXES).join(name)
    }

    /// Makes the image and locks it, or waits until another process has made it.
    async fn make<F>(&self, path: &Path, make: impl Fn(PathBuf) -> F) -> Result<Option<File>>
    where
        F: Future<Output = Result<()>>,
    {
        let Some(part) = Part::begin(path).await? else { return Ok(None) };
        make(part.image()).await?;
        let whole = path.to_owned();
        // Until gigabytes are on the disk others want answers of this thread.
        let placed = spawn_blocking(move || part.place(&whole)).await.unwrap_or_else(|error| Err(error.into()));
        let lock = placed.map_err(Error::host(format!("make {}", path.display())))?;
        self.tidy().await;
        Ok(Some(lock))
    }

    async fn shrink_to(&self, limit_bytes: u64) {
        let cache = self.clone();
        let removed = spawn_blocking(move || cache.remove_unused(limit_bytes)).await;
        if let Err(error) = removed.unwrap_or_else(|error| Err(error.into())) {
            warn!(directory = %self.directory.display(), %error, "the cache of images is not tidied");
        }
    }

    fn remove_unused(&self, limit_bytes: u64) -> io::Result<()> {
        let mut images = Vec::new();
        for entry in entries(&self.directory)? {
            let (path, metadata) = match entry.and_then(|entry| Ok((entry.path(), entry.metadata()?))) {
                Ok(found) => found,
                // Another process has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if metadata.is_file() && is_image(&path) {
                images.push((metadata.modified()?, metadata.blocks() * 512, path));
            } else if metadata.is_dir() && is_part(&path) {
                remove_unless_used(&path)?;
            }
        }
        for entry in entries(&self.directory.join(SANDBOXES))? {
            let path = entry?.path();
            if is_own_directory(&path) {
                remove_unless_used(&path)?;
            }
        }
        images.sort();
        let mut total: u64 = images.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in images {
            if total <= limit_bytes {
                break;
            }
            if remove_unless_used(&path)? {
                total -= bytes;
            }
        }
        Ok(())
    }
}

impl Part {
    /// For the image that is to be at `path`; `None` when another maker was quicker.
    async fn begin(path: &Path) -> Result<Option<Self>> {
        let directory = path.with_added_extension(UNFINISHED);
        let action = || format!("make {}", path.display());
        make_directory(&directory)?;
        let lock = open_locked(&directory, Lock::Exclusive).await.map_err(Error::host(action()))?;
        // Or it is about to remove the directory.
        let Some(part) = lock.map(|lock| Self { directory, _lock: lock }).filter(|_| !path.exists()) else {
            return Ok(None);
        };
        // What a maker that was killed has left is no beginning.
        remove_file(&part.image()).map_err(Error::host(action()))?;
        Ok(Some(part))
    }

    fn image(&self) -> PathBuf {
        self.directory.join("image")
    }

    /// Gives the image its name when it is on the disk, and locks it.
    fn place(self, path: &Path) -> io::Result<File> {
        let whole = File::open(self.image())?;
        whole.sync_all()?;
        whole.try_lock_shared()?;
        fs::rename(self.image(), path)?;
        Ok(whole)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Err(error) = remove_directory(&self.directory) {
            warn!(directory = %self.directory.display(), %error, "an unfinished image stays until the cache is tidied");
        }
    }
}

/// Whether a file of this name is an image of [`super::images`].
fn is_image(path: &Path) -> bool {
    let Some((stem, kind)) = path.file_name().and_then(|name| name.to_str()?.split_once('.')) else { return false };
    match kind {
        "erofs" => stem.len() == 2 * NAME_BYTES && stem.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "ext4" => stem.strip_prefix("writable-").is_some_and(is_number),
        _ => false,
    }
}

fn is_part(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == UNFINISHED) && is_image(&path.with_extension(""))
}

/// Whether a directory of this name is one that a sandbox has for itself.
fn is_own_directory(path: &Path) -> bool {
    let process = path.file_name().and_then(|name| name.to_str()?.rsplit_once('-'));
    process.is_some_and(|(_, process)| is_number(process))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Nothing when there is no such directory.
fn entries(directory: &Path) -> io::Result<impl Iterator<Item = io::Result<DirEntry>>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None.into_iter().flatten()),
        entries => Ok(Some(entries?).into_iter().flatten()),
    }
}

fn is_want_of_room(error: &Error) -> bool {
    matches!(error, Error::Host { source, .. }
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
}

/// Removes a directory with all that is in it, if it is there.
pub fn remove_directory(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn make_directory(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(Error::host(format!("make the directory {} for images", path.display())))
}

/// What is at `path`, unless nothing is or it changes.
async fn open_locked(path: &Path, kind: Lock) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => lock(opened?, path, kind).await,
    }
}

fn remove_unless_used(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        opened => opened?,
    };
    if !lock_unless_used(&file, path)? {
        return Ok(false);
    }
    if file.metadata()?.is_dir() { remove_directory(path) } else { remove_file(path) }.map(|()| true)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::Cell, time::Duration};

    use tokio::sync::Notify;

    const LARGE: u64 = 1 << 30;
    // Names as images have them.
    const A: &str = "writable-1.ext4";
    const B: &str = "writable-2.ext4";
    const C: &str = "writable-3.ext4";
    const D: &str = "00112233445566778899aabbccddeeff.erofs";

    async fn write(path: PathBuf, text: &str) -> Result<()> {
        fs::write(path, text).map_err(Error::host("write"))
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    }

    fn last_used(path: &Path, seconds: u64) {
        File::open(path).unwrap().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    }

    #[tokio::test]
    async fn an_image_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().join("deep/cache"), LARGE);
        let made = Cell::new(0);
        let make = |path| {
            made.set(made.get() + 1);
            write(path, "image")
        };
        let first = cache.get(A, make).await.unwrap();
        let second = cache.get(A, make).await.unwrap();
        assert_eq!((made.get(), fs::read_to_string(&first.path).unwrap()), (1, "image".into()));
        assert_eq!(first.path, second.path);
    }

    #[tokio::test]
    async fn of_two_who_want_it_at_once_one_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        let made = Cell::new(0);
        let make = |path| {
            made.set(made.get() + 1);
            async {
                // The other one comes to wait for the lock meanwhile.
                tokio::task::yield_now().await;
                write(path, "image").await
            }
        };
        let (first, second) = tokio::join!(cache.get(A, make), cache.get(A, make));
        assert_eq!((first.unwrap().path.clone(), made.get()), (second.unwrap().path.clone(), 1));
        assert_eq!(names(dir.path()), [A]);
    }

    #[tokio::test]
    async fn what_a_killed_maker_left_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(format!("{A}.part"))).unwrap();
        fs::write(dir.path().join(format!("{A}.part/image")), "half of an im").unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        let image = cache.get(A, |path| async move {
            assert!(!path.exists());
            write(path, "image").await
        });
        assert_eq!(fs::read_to_string(&image.await.unwrap().path).unwrap(), "image");
    }

    #[tokio::test]
    async fn an_image_that_cannot_be_made_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        let failed = cache.get(A, |_| async { Err(Error::Unsupported("no".into())) }).await;
        assert_eq!(failed.unwrap_err().to_string(), "no");
        assert!(names(dir.path()).is_empty());
        let image = cache.get(A, |path| write(path, "image")).await.unwrap();
        assert_eq!(fs::read_to_string(&image.path).unwrap(), "image");
    }

    #[tokio::test]
    async fn the_image_whose_last_use_was_longest_ago_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), 3 * 4096);
        for (name, seconds) in [(A, 2), (B, 1), (C, 3)] {
            let image = cache.get(name, |path| write(path, "one block")).await.unwrap();
            last_used(&image.path, seconds);
        }
        drop(cache.get(D, |path| write(path, "one block")).await.unwrap());
        assert_eq!(names(dir.path()), [D, A, C]);
    }

    #[tokio::test]
    async fn an_image_in_use_stays_though_the_cache_is_too_large() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), 0);
        let used = cache.get(A, |path| write(path, "x")).await.unwrap();
        drop(cache.get(B, |path| write(path, "x")).await.unwrap());
        drop(cache.get(C, |path| write(path, "x")).await.unwrap());
        assert!(used.path.exists());
        assert!(!dir.path().join(B).exists());
    }

    #[tokio::test]
    async fn an_image_that_is_wanted_no_more_leaves_nothing_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        let stopped = Notify::new();
        let endless = cache.get(A, |path| async {
            write(path, "half of an im").await?;
            stopped.notify_one();
            std::future::pending().await
        });
        tokio::select! {
            _ = endless => {}
            () = stopped.notified() => {}
        }
        assert!(names(dir.path()).is_empty());
    }

    #[tokio::test]
    async fn where_an_image_finds_no_room_those_in_nobodys_use_make_some() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        let _used = cache.get(A, |path| write(path, "x")).await.unwrap();
        drop(cache.get(B, |path| write(path, "x")).await.unwrap());
        let full = || dir.path().join(B).exists();
        let make = |path| async {
            if full() { Err(Error::host("write")(io::ErrorKind::StorageFull.into())) } else { write(path, "x").await }
        };
        cache.get(C, make).await.unwrap();
        assert_eq!(names(dir.path()), [A, C]);
    }

    #[tokio::test]
    async fn where_there_is_no_room_at_all_that_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        let full = cache.get(A, |_| async { Err(Error::host("write")(io::ErrorKind::StorageFull.into())) }).await;
        assert_eq!(sentence(&full.unwrap_err()), "write: no storage space");
    }

    #[tokio::test]
    async fn a_limit_that_was_lowered_holds_when_the_cache_is_next_tidied() {
        let dir = tempfile::tempdir().unwrap();
        drop(ImageCache::new(dir.path().into(), LARGE).get(A, |path| write(path, "x")).await.unwrap());
        ImageCache::new(dir.path().into(), 0).tidy().await;
        assert!(names(dir.path()).is_empty());
    }

    #[tokio::test]
    async fn what_has_another_name_than_the_caches_own_stays() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = ["0011.erofs", "data.ext4", "data.part", "sandboxes", "x.img"];
        for name in ["data.part", "sandboxes/0a1b2c"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        for name in ["0011.erofs", "data.ext4", "x.img"] {
            fs::write(dir.path().join(name), "precious").unwrap();
        }
        ImageCache::new(dir.path().into(), 0).tidy().await;
        assert_eq!(names(dir.path()), foreign);
        assert_eq!(names(&dir.path().join("sandboxes")), ["0a1b2c"]);
    }

    #[tokio::test]
    async fn what_the_dead_left_goes_with_the_next_new_image() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        fs::create_dir(dir.path().join(format!("{B}.part"))).unwrap();
        fs::create_dir_all(dir.path().join("sandboxes/dead-1")).unwrap();
        fs::write(dir.path().join("sandboxes/dead-1/writable.ext4"), "x").unwrap();
        let alive = cache.own_directory("alive-2").await.unwrap();
        drop(cache.get(A, |path| write(path, "x")).await.unwrap());
        assert_eq!(names(dir.path()), ["sandboxes", A]);
        assert_eq!(names(&dir.path().join("sandboxes")), ["alive-2"]);
        remove_directory(&alive.path).unwrap();
        assert!(!alive.path.exists());
    }
}
