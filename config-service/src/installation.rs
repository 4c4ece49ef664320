//! Where this installation keeps its files: the configuration's lookup order, and the launchers.

use std::{
    env,
    ffi::OsStr,
    fs::{self, Metadata},
    path::{Path, PathBuf},
};

use crate::{
    files::{self, Wanted},
    problem::Problem,
    watch::Watch,
};

/// Names the configuration, unless a request does.
pub const FILE_VARIABLE: &str = "CAISSON_CONF_FILE";
/// Where the administrator's configuration lies.
pub const ADMINISTRATOR_FILE: &str = "/etc/caisson/configuration.toml";
/// Where the installation's own configuration lies, below its prefix.
pub const SHIPPED_FILE: &str = "share/defaults/caisson/configuration.toml";

/// Where distributions put programs that only programs execute: virtiofsd.
const HELPER_DIRS: [&str; 2] = ["/usr/libexec", "/usr/lib"];

/// Where to look for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    /// The first that exists is the configuration of a request that names none.
    pub configurations: Vec<PathBuf>,
    /// Where programs are, first match wins: this program's own directory, then `PATH`, then [`HELPER_DIRS`].
    pub program_dirs: Vec<PathBuf>,
}

impl Installation {
    /// The installation that the running program belongs to.
    pub fn of_this_program() -> Self {
        let program_dir = env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
        Self::new(env::var_os(FILE_VARIABLE).as_deref(), env::var_os("PATH").as_deref(), program_dir)
    }

    fn new(file_variable: Option<&OsStr>, path_variable: Option<&OsStr>, program_dir: Option<PathBuf>) -> Self {
        let shipped = program_dir.as_deref().and_then(Path::parent).map(|prefix| prefix.join(SHIPPED_FILE));
        let configurations = match file_variable.filter(|file| !file.is_empty()) {
            Some(file) => vec![PathBuf::from(file)],
            None => [PathBuf::from(ADMINISTRATOR_FILE)].into_iter().chain(shipped).collect(),
        };
        let path = path_variable.map(|path| env::split_paths(path).collect::<Vec<_>>()).unwrap_or_default();
        let program_dirs = program_dir.into_iter().chain(path).chain(HELPER_DIRS.map(PathBuf::from)).collect();
        Self { configurations, program_dirs }
    }

    /// The configuration to read: `requested`, or the first of the lookup order.
    pub(crate) fn find(&self, requested: Option<&Path>, watch: &mut Watch) -> Result<Found, Problem> {
        let Some(requested) = requested else {
            let first = Found::at(self.first_configuration(watch)?, watch)?;
            // The administrator's drop-ins hold while the installation's own file is in force, too.
            let link = self.configurations.first().cloned().unwrap_or(first.link);
            return Ok(Found { link, file: first.file });
        };
        Found::at(requested, watch)
    }

    /// Where configurations lie that can be chosen: beside the administrator's, and beside the installation's own.
    pub(crate) fn configuration_dirs(&self) -> Vec<&Path> {
        self.configurations.iter().filter_map(|file| file.parent()).collect()
    }

    fn first_configuration(&self, watch: &mut Watch) -> Result<&Path, Problem> {
        for file in &self.configurations {
            watch.look(file);
            // A symlink to nowhere is a mistake to report, not a reason to look further.
            if fs::symlink_metadata(file).is_ok() {
                return Ok(file);
            }
        }
        let tried: Vec<_> = self.configurations.iter().map(|file| file.display().to_string()).collect();
        Err(Problem::general(format!("there is no configuration: tried {}", tried.join(", "))))
    }

    /// The program `name`, and what was seen of it.
    pub(crate) fn find_program(&self, name: &str, watch: &mut Watch) -> Option<(PathBuf, Metadata)> {
        self.program_dirs.iter().map(|dir| dir.join(name)).find_map(|file| {
            let metadata = watch.look(&file)?;
            files::examine(&file, Wanted::Program).ok().map(|()| (file, metadata))
        })
    }
}

/// A configuration that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The path that was asked for, or where the administrator's would be.
    pub(crate) link: PathBuf,
    /// The file itself, symlinks resolved.
    pub(crate) file: PathBuf,
}

impl Found {
    /// At `link`, which may be a symlink.
    pub(crate) fn at(link: &Path, watch: &mut Watch) -> Result<Self, Problem> {
        if !link.is_absolute() {
            return Err(Problem::general(format!("read {}: not an absolute path", link.display())));
        }
        watch.look(link);
        let file = fs::canonicalize(link);
        let file = file.map_err(|error| Problem::general(format!("read {}: {error}", link.display())))?;
        Ok(Self { link: link.to_owned(), file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_variable_the_administrators_file_comes_before_the_shipped_one() {
        let installation = Installation::new(None, None, Some("/opt/caisson/bin".into()));
        assert_eq!(
            installation.configurations,
            ["/etc/caisson/configuration.toml", "/opt/caisson/share/defaults/caisson/configuration.toml"]
                .map(PathBuf::from)
        );
    }

    #[test]
    fn the_variable_comes_alone() {
        let installation = Installation::new(Some("/x.toml".as_ref()), None, Some("/usr/bin".into()));
        assert_eq!(installation.configurations, [PathBuf::from("/x.toml")]);
    }

    #[test]
    fn programs_beside_this_one_come_before_those_in_path() {
        let installation = Installation::new(None, Some("/bin:/sbin".as_ref()), Some("/opt/bin".into()));
        let expected = ["/opt/bin", "/bin", "/sbin", "/usr/libexec", "/usr/lib"].map(PathBuf::from);
        assert_eq!(installation.program_dirs, expected);
    }

    #[test]
    fn without_any_configuration_the_error_lists_what_was_tried() {
        let installation =
            Installation { configurations: vec!["/no/a.toml".into(), "/no/b.toml".into()], program_dirs: vec![] };
        let problem = installation.find(None, &mut Watch::new()).unwrap_err();
        assert_eq!(problem.to_string(), "there is no configuration: tried /no/a.toml, /no/b.toml");
    }
}
