//! Putting files where they belong: each in one step, and never over what somebody has changed.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::digest;

/// One file to install.
#[derive(Debug)]
pub(super) struct Artifact {
    /// On the host where it will be used.
    pub(super) path: PathBuf,
    pub(super) content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    /// A copy, which replaces whatever is there.
    Program(PathBuf),
    /// A text, which people may change.
    Text(String),
    /// A symbolic link, which people may change.
    Link(PathBuf),
}

/// What became of one.
#[derive(Debug, Serialize)]
pub(super) struct Placed {
    pub(super) path: PathBuf,
    pub(super) outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    Created,
    Replaced,
    Unchanged,
    /// Somebody has changed it, and it stays.
    Kept,
    Removed,
}

impl Outcome {
    /// For people.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Replaced => "replaced",
            Self::Unchanged => "unchanged",
            Self::Kept => "kept",
            Self::Removed => "removed",
        }
    }

    pub(super) fn is_change(self) -> bool {
        match self {
            Self::Created | Self::Replaced | Self::Removed => true,
            Self::Unchanged | Self::Kept => false,
        }
    }
}

/// The root of the host, or what shall become one.
#[derive(Debug)]
pub(super) struct Destination {
    root: Option<PathBuf>,
    dry_run: bool,
}

impl Destination {
    pub(super) fn new(root: Option<&Path>, dry_run: bool) -> Self {
        Self { root: root.map(Path::to_owned), dry_run }
    }

    pub(super) fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    /// Where `path` lies now.
    pub(super) fn resolve(&self, path: &Path) -> PathBuf {
        match &self.root {
            Some(root) => root.join(path.strip_prefix("/").unwrap_or(path)),
            None => path.to_owned(),
        }
    }

    /// Puts `artifact` into its place; `recorded` is the digest of what was installed there before.
    pub(super) fn place(&self, artifact: &Artifact, recorded: Option<&str>) -> anyhow::Result<Placed> {
        let target = self.resolve(&artifact.path);
        let attempt = || format!("install {}", target.display());
        let outcome = judge(artifact, recorded, &target).with_context(attempt)?;
        if outcome.is_change() && !self.dry_run {
            write(&artifact.content, &target).with_context(attempt)?;
        }
        Ok(Placed { path: artifact.path.clone(), outcome })
    }

    /// Removes what was installed at `path` with digest `recorded`, unless somebody has changed it.
    pub(super) fn remove(&self, path: &Path, recorded: &str, is_program: bool) -> anyhow::Result<Option<Placed>> {
        let target = self.resolve(path);
        let attempt = || format!("remove {}", target.display());
        let Some(present) = digest_at(&target).with_context(attempt)? else { return Ok(None) };
        if !is_program && present != recorded {
            return Ok(Some(Placed { path: path.to_owned(), outcome: Outcome::Kept }));
        }
        if !self.dry_run {
            fs::remove_file(&target).with_context(attempt)?;
        }
        Ok(Some(Placed { path: path.to_owned(), outcome: Outcome::Removed }))
    }
}

impl Content {
    /// Tells this content from every other; links count by what they name.
    pub(super) fn digest(&self) -> io::Result<String> {
        match self {
            Self::Program(source) => digest::of_file(source),
            Self::Text(text) => Ok(digest::of_bytes(text.as_bytes())),
            Self::Link(to) => Ok(digest::of_bytes(format!("link to {}", to.display()).as_bytes())),
        }
    }
}

fn judge(artifact: &Artifact, recorded: Option<&str>, target: &Path) -> io::Result<Outcome> {
    let Some(present) = digest_at(target)? else { return Ok(Outcome::Created) };
    if present == artifact.content.digest()? {
        return Ok(Outcome::Unchanged);
    }
    Ok(match artifact.content {
        Content::Program(_) => Outcome::Replaced,
        Content::Text(_) | Content::Link(_) if recorded == Some(&present) => Outcome::Replaced,
        Content::Text(_) | Content::Link(_) => Outcome::Kept,
    })
}

/// None when nothing is there.
fn digest_at(path: &Path) -> io::Result<Option<String>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => Content::Link(fs::read_link(path)?).digest().map(Some),
        Ok(_) => digest::of_file(path).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn write(content: &Content, target: &Path) -> io::Result<()> {
    let dir = target.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir)?;
    match content {
        Content::Program(source) => {
            // A running program cannot be written to, but another can take its name.
            let mut new = NamedTempFile::new_in(dir)?;
            io::copy(&mut fs::File::open(source)?, &mut new)?;
            persist(new, target, 0o755)
        }
        Content::Text(text) => replace(target, text, 0o644),
        Content::Link(to) => {
            // A name of its own for the moment between.
            let new = tempfile::Builder::new().make_in(dir, |path| symlink(to, path))?;
            new.into_temp_path().persist(target).map_err(|error| error.error)
        }
    }
}

/// Gives `target` a new text in one step, also across a crash.
pub(super) fn replace(target: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut new = NamedTempFile::new_in(target.parent().unwrap_or(Path::new("/")))?;
    io::Write::write_all(&mut new, text.as_bytes())?;
    persist(new, target, mode)
}

fn persist(new: NamedTempFile, target: &Path, mode: u32) -> io::Result<()> {
    new.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    new.as_file().sync_all()?;
    new.persist(target).map(drop).map_err(|error| error.error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact(path: &Path, text: &str) -> Artifact {
        Artifact { path: path.to_owned(), content: Content::Text(text.to_owned()) }
    }

    fn here() -> Destination {
        Destination::new(None, false)
    }

    #[test]
    fn a_new_file_is_created_and_the_same_one_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let artifact = artifact(&dir.path().join("a/b.toml"), "x = 1\n");
        assert_eq!(here().place(&artifact, None).unwrap().outcome, Outcome::Created);
        assert_eq!(here().place(&artifact, None).unwrap().outcome, Outcome::Unchanged);
        assert_eq!(fs::read_to_string(dir.path().join("a/b.toml")).unwrap(), "x = 1\n");
    }

    #[test]
    fn what_is_still_as_it_was_installed_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("a"), Content::Text("old".into()).digest().unwrap());
        here().place(&artifact(&path, "old"), None).unwrap();
        assert_eq!(here().place(&artifact(&path, "new"), Some(&old)).unwrap().outcome, Outcome::Replaced);
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }

    #[test]
    fn what_somebody_has_changed_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("a"), Content::Text("old".into()).digest().unwrap());
        fs::write(&path, "mine").unwrap();
        assert_eq!(here().place(&artifact(&path, "new"), Some(&old)).unwrap().outcome, Outcome::Kept);
        assert_eq!(here().remove(&path, &old, false).unwrap().unwrap().outcome, Outcome::Kept);
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn a_program_is_replaced_whatever_was_there_and_can_be_executed() {
        let dir = tempfile::tempdir().unwrap();
        let (source, path) = (dir.path().join("source"), dir.path().join("program"));
        fs::write(&source, "new").unwrap();
        fs::write(&path, "other").unwrap();
        let program = Artifact { path: path.clone(), content: Content::Program(source) };
        assert_eq!(here().place(&program, None).unwrap().outcome, Outcome::Replaced);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
    }

    #[test]
    fn a_link_that_points_elsewhere_by_somebodys_will_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("configuration.toml");
        let link = |to: &str| Artifact { path: path.clone(), content: Content::Link(to.into()) };
        assert_eq!(here().place(&link("qemu.toml"), None).unwrap().outcome, Outcome::Created);
        assert_eq!(here().place(&link("fc.toml"), None).unwrap().outcome, Outcome::Kept);
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("qemu.toml"));
    }

    #[test]
    fn a_package_is_written_below_its_own_root() {
        let dir = tempfile::tempdir().unwrap();
        let destination = Destination::new(Some(dir.path()), false);
        let placed = destination.place(&artifact(Path::new("/usr/share/x"), "x"), None).unwrap();
        assert_eq!(placed.path, Path::new("/usr/share/x"));
        assert!(dir.path().join("usr/share/x").exists());
    }

    #[test]
    fn a_dry_run_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let destination = Destination::new(Some(dir.path()), true);
        let placed = destination.place(&artifact(Path::new("/x"), "x"), None).unwrap();
        assert_eq!((placed.outcome, dir.path().join("x").exists()), (Outcome::Created, false));
    }
}
