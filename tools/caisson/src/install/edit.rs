//! Editing a file that is somebody else's: the difference is shown, the old text kept.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde::Serialize;
use similar::TextDiff;

use super::files;

/// What is added to the name of the file that keeps the old text.
const BACKUP: &str = ".before-caisson";

/// What was changed, or would be.
#[derive(Debug, Serialize)]
pub(super) struct Edited {
    pub(super) file: PathBuf,
    /// As `diff -u`; empty when nothing needed changing.
    pub(super) diff: String,
    /// The old text; none when there was no file or no change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backup: Option<PathBuf>,
}

impl Edited {
    pub(super) fn is_change(&self) -> bool {
        !self.diff.is_empty()
    }

    pub(super) fn text(&self) -> String {
        if !self.is_change() {
            return format!("{} is as it should be\n", self.file.display());
        }
        let backup = self.backup.as_ref().map(|backup| format!("the old text is in {}\n", backup.display()));
        format!("{}{}", self.diff, backup.unwrap_or_default())
    }
}

/// None when there is no such file.
pub(super) fn read(file: &Path) -> anyhow::Result<Option<String>> {
    let attempt = || format!("read {}", file.display());
    match fs::metadata(file) {
        // A fifo would be waited for.
        Ok(metadata) if !metadata.is_file() => bail!("read {}: not a file", file.display()),
        Ok(_) => fs::read_to_string(file).with_context(attempt).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(attempt),
    }
}

/// Makes `after` the text of `file`, which was `before`.
pub(super) fn apply(file: &Path, before: Option<String>, after: String, dry_run: bool) -> anyhow::Result<Edited> {
    let old = before.as_deref().unwrap_or_default();
    if old == after {
        return Ok(Edited { file: file.to_owned(), diff: String::new(), backup: None });
    }
    let name = file.display().to_string();
    let diff = TextDiff::from_lines(old, &after).unified_diff().header(&name, &name).to_string();
    let backup = before.as_ref().map(|_| backup_of(file));
    if !dry_run {
        write(file, before.as_deref(), &after).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(Edited { file: file.to_owned(), diff, backup })
}

fn write(file: &Path, before: Option<&str>, after: &str) -> io::Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    let Some(before) = before else { return files::replace(file, after, 0o644) };
    let mode = fs::metadata(file)?.permissions().mode() & 0o7777;
    files::replace(&backup_of(file), before, mode)?;
    // A link stays one.
    files::replace(&fs::canonicalize(file)?, after, mode)
}

fn backup_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(BACKUP);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_change_is_shown_and_the_old_text_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::write(&file, "a = 1\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let edited = apply(&file, read(&file).unwrap(), "a = 2\n".into(), false).unwrap();
        assert!(edited.diff.ends_with("@@ -1 +1 @@\n-a = 1\n+a = 2\n"), "{}", edited.diff);
        assert_eq!(fs::read_to_string(&file).unwrap(), "a = 2\n");
        assert_eq!(fs::read_to_string(edited.backup.unwrap()).unwrap(), "a = 1\n");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn without_a_change_the_backup_stays_what_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::write(&file, "a = 1\n").unwrap();
        let edited = apply(&file, read(&file).unwrap(), "a = 1\n".into(), false).unwrap();
        assert!(!edited.is_change() && !backup_of(&file).exists());
    }

    #[test]
    fn behind_a_link_the_file_is_changed_and_the_link_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("real.toml"), dir.path().join("config.toml"));
        fs::write(&file, "a = 1\n").unwrap();
        symlink(&file, &link).unwrap();
        apply(&link, read(&link).unwrap(), "a = 2\n".into(), false).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "a = 2\n");
    }

    #[test]
    fn a_dry_run_shows_the_same_difference_and_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/config.toml");
        let edited = apply(&file, None, "a = 2\n".into(), true).unwrap();
        assert!(edited.diff.contains("+a = 2") && edited.backup.is_none());
        assert!(!file.exists());
    }
}
