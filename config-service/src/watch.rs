//! The files that an answer depends on, and whether they are still what they were.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A file changed so shortly before it was read may change again without its times telling: the kernel's clock for
/// them ticks at most every 10 ms.
const TICK: Duration = Duration::from_millis(20);

/// What was looked at to make one answer, also what was not there.
#[derive(Debug)]
pub(crate) struct Watch {
    seen: BTreeMap<PathBuf, Option<Stamp>>,
    since: SystemTime,
}

/// Tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Watch {
    /// Nothing seen yet.
    pub(crate) fn new() -> Self {
        Self { seen: BTreeMap::new(), since: SystemTime::now() }
    }

    /// Looks at `path`, through symlinks, and remembers what was there. Call it before reading.
    pub(crate) fn look(&mut self, path: &Path) -> Option<Metadata> {
        let metadata = fs::metadata(path).ok();
        self.seen.entry(path.to_owned()).or_insert_with(|| metadata.as_ref().map(Stamp::of));
        metadata
    }

    /// Everything that was looked at.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        self.seen.keys().cloned().collect()
    }

    /// Whether a new look would see the same.
    pub(crate) fn is_unchanged(&self) -> bool {
        let settled = self.since.checked_sub(TICK).unwrap_or(UNIX_EPOCH);
        self.seen.iter().all(|(path, then)| {
            let now = fs::metadata(path).ok().as_ref().map(Stamp::of);
            now == *then && now.is_none_or(|now| now.is_older_than(settled))
        })
    }
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn is_older_than(&self, time: SystemTime) -> bool {
        let time = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.changed < (time.as_secs() as i64, i64::from(time.subsec_nanos()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A watch on `path` as if it had begun a minute later.
    fn settled_watch(path: &Path) -> Watch {
        let mut watch = Watch { since: SystemTime::now() + Duration::from_secs(60), ..Watch::new() };
        watch.look(path);
        watch
    }

    #[test]
    fn an_untouched_file_is_unchanged() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(settled_watch(file.path()).is_unchanged());
    }

    #[test]
    fn a_file_that_appears_is_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let watch = settled_watch(&folder.path().join("new"));
        assert!(watch.is_unchanged());
        fs::write(folder.path().join("new"), "").unwrap();
        assert!(!watch.is_unchanged());
    }

    #[test]
    fn a_file_replaced_by_one_of_the_same_size_is_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        fs::write(&old, "a").unwrap();
        fs::write(&new, "b").unwrap();
        let watch = settled_watch(&old);
        fs::rename(&new, &old).unwrap();
        assert!(!watch.is_unchanged());
    }

    #[test]
    fn a_file_written_just_before_the_look_is_not_trusted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut watch = Watch::new();
        watch.look(file.path());
        assert!(!watch.is_unchanged());
    }
}
