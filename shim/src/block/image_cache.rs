//! Images that are made once and used by every sandbox of the host.
//!
//! ```text
//! <cache>/<name>            an image that is whole; who uses it holds a shared lock on it
//! <cache>/<name>.part/      where one is being made; its maker holds a lock on the directory
//! <cache>/sandboxes/<name>/ what one sandbox has for itself; it holds a lock on the directory
//! ```
//! An image gets its name in one step when it is on the disk. Whatever nobody holds a lock on was left by a process that
//! was killed, or is kept only for the next user: when the directory has grown beyond its limit, the images whose last
//! use was longest ago go.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use tracing::warn;

use crate::{
    Error, Result,
    block::locks::{Lock, lock, lock_unless_used},
};

const UNFINISHED: &str = "part";
const SANDBOXES: &str = "sandboxes";

/// The directory, as one process uses it.
#[derive(Clone, Debug)]
pub struct ImageCache {
    directory: PathBuf,
    limit_bytes: u64,
}

/// An image in use: it stays as long as this value.
#[derive(Debug)]
pub struct Image {
    /// Read-only for everybody.
    pub path: PathBuf,
    _lock: File,
}

/// A sandbox's own directory in the cache. Whoever removes the sandbox removes it, with [`remove_directory`]; should nobody
/// do so, it goes with the next new image once this value is dropped.
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
            if let Some(lock) = self.make(&path, &make).await? {
                return Ok(Arc::new(Image { path, _lock: lock }));
            }
        }
    }

    /// The directory that a sandbox has for itself; nobody else uses this `name`.
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
        let part = path.with_added_extension(UNFINISHED);
        let action = || format!("make {}", path.display());
        make_directory(&part)?;
        let locked = open_locked(&part, Lock::Exclusive).await.map_err(Error::host(action()))?;
        // Another maker was quicker, and has removed the directory or is about to.
        let Some(_locked) = locked.filter(|_| !path.exists()) else { return Ok(None) };
        let image = part.join("image");
        // What a maker that was killed has left is no beginning.
        remove_file(&image).map_err(Error::host(action()))?;
        make(image.clone()).await?;
        let place = || {
            let whole = File::open(&image)?;
            whole.sync_all()?;
            whole.try_lock_shared()?;
            fs::rename(&image, path)?;
            remove_directory(&part)?;
            Ok(whole)
        };
        let lock = place().map_err(Error::host(action()))?;
        if let Err(error) = self.collect_garbage() {
            warn!(directory = %self.directory.display(), %error, "the cache of images is not tidied");
        }
        Ok(Some(lock))
    }

    /// Removes what was left by the dead, and what is too much.
    fn collect_garbage(&self) -> io::Result<()> {
        let mut images = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let (path, metadata) = match entry.and_then(|entry| Ok((entry.path(), entry.metadata()?))) {
                Ok(found) => found,
                // Another process has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if metadata.is_file() {
                images.push((metadata.modified()?, metadata.blocks() * 512, path));
            } else if path.extension().is_some_and(|extension| extension == UNFINISHED) {
                remove_unless_used(&path)?;
            }
        }
        for entry in fs::read_dir(self.directory.join(SANDBOXES)).into_iter().flatten() {
            remove_unless_used(&entry?.path())?;
        }
        images.sort();
        let mut total: u64 = images.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in images {
            if total <= self.limit_bytes {
                break;
            }
            if remove_unless_used(&path)? {
                total -= bytes;
            }
        }
        Ok(())
    }
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

    const LARGE: u64 = 1 << 30;

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
        let first = cache.get("a", make).await.unwrap();
        let second = cache.get("a", make).await.unwrap();
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
        let (first, second) = tokio::join!(cache.get("a", make), cache.get("a", make));
        assert_eq!((first.unwrap().path.clone(), made.get()), (second.unwrap().path.clone(), 1));
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[tokio::test]
    async fn what_a_killed_maker_left_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a.part")).unwrap();
        fs::write(dir.path().join("a.part/image"), "half of an im").unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        let image = cache.get("a", |path| async move {
            assert!(!path.exists());
            write(path, "image").await
        });
        assert_eq!(fs::read_to_string(&image.await.unwrap().path).unwrap(), "image");
    }

    #[tokio::test]
    async fn an_image_that_cannot_be_made_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        let failed = cache.get("a", |_| async { Err(Error::Unsupported("no".into())) }).await;
        assert_eq!(failed.unwrap_err().to_string(), "no");
        let image = cache.get("a", |path| write(path, "image")).await.unwrap();
        assert_eq!(fs::read_to_string(&image.path).unwrap(), "image");
    }

    #[tokio::test]
    async fn the_image_whose_last_use_was_longest_ago_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), 3 * 4096);
        for (name, seconds) in [("a", 2), ("b", 1), ("c", 3)] {
            let image = cache.get(name, |path| write(path, "one block")).await.unwrap();
            last_used(&image.path, seconds);
        }
        drop(cache.get("d", |path| write(path, "one block")).await.unwrap());
        assert_eq!(names(dir.path()), ["a", "c", "d"]);
    }

    #[tokio::test]
    async fn an_image_in_use_stays_though_the_cache_is_too_large() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), 0);
        let used = cache.get("used", |path| write(path, "x")).await.unwrap();
        drop(cache.get("unused", |path| write(path, "x")).await.unwrap());
        drop(cache.get("new", |path| write(path, "x")).await.unwrap());
        assert!(used.path.exists());
        assert!(!dir.path().join("unused").exists());
    }

    #[tokio::test]
    async fn what_the_dead_left_goes_with_the_next_new_image() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ImageCache::new(dir.path().into(), LARGE);
        fs::create_dir(dir.path().join("left.part")).unwrap();
        fs::create_dir_all(dir.path().join("sandboxes/dead")).unwrap();
        fs::write(dir.path().join("sandboxes/dead/writable.ext4"), "x").unwrap();
        let alive = cache.own_directory("alive").await.unwrap();
        drop(cache.get("a", |path| write(path, "x")).await.unwrap());
        assert_eq!(names(dir.path()), ["a", "sandboxes"]);
        assert_eq!(names(&dir.path().join("sandboxes")), ["alive"]);
        remove_directory(&alive.path).unwrap();
        assert!(!alive.path.exists());
    }
}
