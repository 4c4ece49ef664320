//! What is slow to make and the same every time: kept by a digest of what it is made from.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::image::hex;

const VARIABLE: &str = "CAISSON_CACHE";
const DEFAULT: &str = "/var/cache/caisson";

/// A folder of finished things.
#[derive(Clone, Debug)]
pub struct Cache(PathBuf);

impl Cache {
    /// `$CAISSON_CACHE`, or /var/cache/caisson.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open() -> Result<Self> {
        Self::at(env::var_os(VARIABLE).map_or_else(|| DEFAULT.into(), PathBuf::from))
    }

    fn at(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("make the cache {}", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("find the cache {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// What `make` makes from `inputs`: called with the path of a file or folder to make, and only when there is none yet.
    /// A `make` that fails or is interrupted leaves nothing that would be taken for finished.
    ///
    /// # Errors
    /// What `make` says.
    pub fn get(&self, name: &str, inputs: &[&[u8]], make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let digests: Vec<String> = inputs.iter().map(|input| hex(input)).collect();
        let entry = self.0.join(format!("{name}-{}", &hex(digests.join("\n").as_bytes())[..16]));
        if entry.exists() {
            return Ok(entry);
        }
        let scratch =
            tempfile::Builder::new().prefix(".making-").tempdir_in(&self.0).context("make a folder in the cache")?;
        let made = scratch.path().join(name);
        make(&made)?;
        match fs::rename(&made, &entry) {
            // Somebody else was quicker with the same thing.
            Err(_) if entry.exists() => Ok(entry),
            renamed => renamed.map(|()| entry).with_context(|| format!("keep {name} in the cache")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_inputs_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache")).unwrap();
        let first = cache.get("thing", &[b"a"], |path| Ok(fs::write(path, "made")?)).unwrap();
        let second = cache.get("thing", &[b"a"], |_| panic!("made twice")).unwrap();
        assert_eq!(first, second);
        assert_eq!(fs::read_to_string(second).unwrap(), "made");
    }

    #[test]
    fn other_inputs_are_another_thing_also_when_only_their_borders_differ() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned()).unwrap();
        let first = cache.get("thing", &[b"ab", b"c"], |path| Ok(fs::write(path, "1")?)).unwrap();
        let second = cache.get("thing", &[b"a", b"bc"], |path| Ok(fs::write(path, "2")?)).unwrap();
        assert_ne!(first, second);
    }

    #[test]
    fn a_failed_attempt_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned()).unwrap();
        let attempt = |path: &Path| {
            fs::write(path, "half")?;
            anyhow::bail!("interrupted")
        };
        assert!(cache.get("thing", &[b"a"], attempt).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
