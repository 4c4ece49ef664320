//! The content-addressed cache: what was built from given inputs is found again by the digest of those inputs.
//!
//! An entry appears whole (built in a temporary directory, then renamed) and one builder at a time makes it (flock), so
//! concurrent builders share their work. Files carry their digests; an entry that no longer matches is made anew.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::digest;
use crate::error::{Error, Result};
use crate::manifest::{Artifact, Section};

/// Name of the record inside an entry.
const RECORD: &str = "entry.json";

/// Directory, and name of the lock, of work in progress.
const BUILDING: &str = "building";

/// A cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// What was found in, or has just been put into, the cache.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Holds the artifacts; not to be written to.
    pub directory: PathBuf,
    /// How it was made and what it holds.
    pub section: Section,
    /// Whether it was there already.
    pub reused: bool,
}

/// A directory for work in progress, on the cache's filesystem; removed when dropped, or by a later builder.
#[derive(Debug)]
pub struct Workplace {
    directory: tempfile::TempDir,
    /// On the directory itself: tells it from one that a killed builder left.
    _lock: File,
}

impl Workplace {
    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    fn move_to(&mut self, target: &Path) -> std::io::Result<()> {
        fs::rename(self.directory.path(), target)?;
        self.directory.disable_cleanup(true);
        Ok(())
    }
}

impl Entry {
    /// Where an artifact of this entry is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Cache {
    /// Opens a cache directory, creating it if need be.
    pub fn open(root: &Path) -> Result<Self> {
        for name in ["entries", "locks", BUILDING] {
            let directory = root.join(name);
            fs::create_dir_all(&directory).map_err(Error::file("create", &directory))?;
        }
        let cache = Self { root: root.to_owned() };
        cache.sweep()?;
        Ok(cache)
    }

    /// `$CAISSON_CACHE`, or `/var/cache/caisson`.
    pub fn default_root() -> PathBuf {
        std::env::var_os("CAISSON_CACHE")
            .filter(|value| !value.is_empty())
            .map_or_else(|| PathBuf::from("/var/cache/caisson"), PathBuf::from)
            .join("images")
    }

    /// The entry made from `section`'s inputs and options, made by `make` when it is not there.
    ///
    /// `make` fills the directory it is given and returns the section with its outputs' names known; sizes and
    /// digests are added here.
    pub fn entry(
        &self,
        kind: &str,
        section: Section,
        make: impl FnOnce(&Path, &mut Section) -> Result<()>,
    ) -> Result<Entry> {
        let key = section.key(kind);
        let name = format!("{kind}-{key}");
        let directory = self.root.join("entries").join(&name);
        let _lock = self.lock(&name)?;
        if let Some(section) = read_entry(&directory) {
            return Ok(Entry { directory, section, reused: true });
        }
        let mut building = self.temporary()?;
        let mut section = section;
        make(building.path(), &mut section)?;
        section.outputs = describe(building.path())?;
        let record = building.path().join(RECORD);
        fs::write(&record, serde_json::to_vec_pretty(&section).unwrap_or_default())
            .map_err(Error::file("write", &record))?;
        if directory.exists() {
            fs::remove_dir_all(&directory).map_err(Error::file("remove the damaged cache entry", &directory))?;
        }
        building.move_to(&directory).map_err(Error::file("create", &directory))?;
        Ok(Entry { directory, section, reused: false })
    }

    /// A new empty directory on the cache's filesystem.
    pub fn temporary(&self) -> Result<Workplace> {
        let parent = self.root.join(BUILDING);
        let _lock = self.lock(BUILDING)?;
        let directory =
            tempfile::Builder::new().prefix("build-").tempdir_in(&parent).map_err(Error::file("create", &parent))?;
        let lock = File::open(directory.path()).map_err(Error::file("open", &parent))?;
        lock.lock().map_err(Error::file("lock", &parent))?;
        Ok(Workplace { directory, _lock: lock })
    }

    /// Removes what builders that were killed have left: nobody holds a lock on it.
    fn sweep(&self) -> Result<()> {
        let parent = self.root.join(BUILDING);
        let _lock = self.lock(BUILDING)?;
        for entry in fs::read_dir(&parent).map_err(Error::file("read", &parent))? {
            let path = entry.map_err(Error::file("read", &parent))?.path();
            let abandoned = File::open(&path).is_ok_and(|directory| directory.try_lock().is_ok());
            if abandoned {
                fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Holds the lock of one entry until dropped; waits for whoever is making it.
    fn lock(&self, name: &str) -> Result<File> {
        lock(&self.root.join("locks").join(name))
    }
}

/// Takes an exclusive lock on a lock file, waiting for its holder; the kernel lets go of it when the holder ends.
pub fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(Error::file("create", path))?;
    file.lock().map_err(Error::file("lock", path))?;
    Ok(file)
}

/// The record of a complete and undamaged entry.
fn read_entry(directory: &Path) -> Option<Section> {
    let section: Section = serde_json::from_slice(&fs::read(directory.join(RECORD)).ok()?).ok()?;
    let intact = |artifact: &Artifact| {
        let path = directory.join(&artifact.name);
        fs::metadata(&path).is_ok_and(|metadata| metadata.len() == artifact.size)
            && digest::of_file(&path).is_ok_and(|found| found == artifact.sha256)
    };
    section.outputs.iter().all(intact).then_some(section)
}

/// Every file of a new entry with size and digest, by name.
fn describe(directory: &Path) -> Result<Vec<Artifact>> {
    let mut artifacts = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::file("read", directory))? {
        let path = entry.map_err(Error::file("read", directory))?.path();
        if path.is_file() {
            artifacts.push(Artifact::describe(&path)?);
        }
    }
    artifacts.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(artifacts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(version: &str) -> Section {
        Section::default().input("thing", Some(version), "00")
    }

    fn make(directory: &Path, _: &mut Section) -> Result<()> {
        fs::write(directory.join("file"), "content").map_err(Error::file("write", directory))
    }

    fn must_not_make(_: &Path, _: &mut Section) -> Result<()> {
        Err(Error::Unsupported("made again".to_owned()))
    }

    #[test]
    fn the_second_time_an_entry_is_found() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path()).unwrap();
        let first = cache.entry("kind", section("1"), make).unwrap();
        let second = cache.entry("kind", section("1"), must_not_make).unwrap();
        assert!(!first.reused && second.reused);
        assert_eq!(fs::read_to_string(second.path("file")).unwrap(), "content");
        assert_eq!(first.section, second.section);
    }

    #[test]
    fn other_inputs_are_another_entry() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path()).unwrap();
        cache.entry("kind", section("1"), make).unwrap();
        assert!(cache.entry("kind", section("2"), must_not_make).is_err());
    }

    #[test]
    fn a_damaged_entry_is_made_anew() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path()).unwrap();
        let entry = cache.entry("kind", section("1"), make).unwrap();
        fs::write(entry.path("file"), "CONTENT").unwrap();
        let entry = cache.entry("kind", section("1"), make).unwrap();
        assert!(!entry.reused);
        assert_eq!(fs::read_to_string(entry.path("file")).unwrap(), "content");
    }

    #[test]
    fn a_failed_build_leaves_nothing_behind() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path()).unwrap();
        cache.entry("kind", section("1"), must_not_make).unwrap_err();
        assert_eq!(fs::read_dir(root.path().join("entries")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(root.path().join(BUILDING)).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_builder_left_is_removed_and_work_in_progress_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path()).unwrap();
        let working = cache.temporary().unwrap();
        let abandoned = root.path().join(BUILDING).join("build-abandoned");
        fs::create_dir(&abandoned).unwrap();
        Cache::open(root.path()).unwrap();
        assert!(working.path().exists() && !abandoned.exists());
    }

    #[test]
    fn two_builders_at_once_make_an_entry_once() {
        let root = tempfile::tempdir().unwrap();
        let made = std::sync::atomic::AtomicU32::new(0);
        let build = || {
            let cache = Cache::open(root.path()).unwrap();
            let entry = cache.entry("kind", section("1"), |directory, section| {
                made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                make(directory, section)
            });
            assert_eq!(fs::read_to_string(entry.unwrap().path("file")).unwrap(), "content");
        };
        std::thread::scope(|scope| {
            scope.spawn(build);
            scope.spawn(build);
        });
        assert_eq!(made.into_inner(), 1);
    }
}
