//! Which configurations there are, and how another one is put in force: by a symbolic link that is replaced at once.
//!
//! Beside the link lies its history, one target a line, which is written before the link is. So whatever is killed
//! when, the line before the link's own target is the configuration that was in force before.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use caisson_protocol::config::SandboxConfig;
use nix::fcntl::{Flock, FlockArg};

use crate::{
    atomic,
    hypervisor::{self, KNOWN},
    installation::{ADMINISTRATOR_FILE, Found, Installation},
    problem::{Problems, quote, suggest},
    resolve::Resolver,
    watch::Watch,
};

/// How many switches can be undone.
const MAX_HISTORY: usize = 32;

/// A configuration that can be put in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// The file, symlinks resolved.
    pub path: PathBuf,
    /// Which it chooses, canonical; none when it does not tell.
    pub hypervisor: Option<String>,
    /// Whether a request without a path gets it.
    pub in_force: bool,
    /// What a sandbox gets of it, as far as nothing is wrong with it.
    pub config: SandboxConfig,
    /// Each a sentence; none when it can be used.
    pub problems: Vec<String>,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switched {
    /// What the link names now; none when it is gone, so that the installation's own configuration is in force.
    pub now: Option<PathBuf>,
    /// What it named; none when there was none.
    pub before: Option<PathBuf>,
}

/// Why another configuration is not in force.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such file.
    #[error("there is no configuration for {name}: looked for {looked}{suggestion}")]
    Unknown {
        /// As it was asked for.
        name: String,
        /// Where it might have been.
        looked: String,
        /// What may have been meant.
        suggestion: String,
    },
    /// It has problems.
    #[error(transparent)]
    Broken(#[from] Problems),
    /// There is a file where the link would be.
    #[error(
        "{link} is a file and not a symbolic link, which switching would lose: rename it to configuration-<name>.toml"
    )]
    NoLink {
        /// The file.
        link: PathBuf,
    },
    /// Nothing was in force before.
    #[error("{link} was not switched before")]
    NoPrevious {
        /// The link.
        link: PathBuf,
    },
    /// The link or its history cannot be written.
    #[error("{attempt} {path}")]
    Write {
        /// What was tried.
        attempt: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// All `configuration-*.toml` beside the administrator's configuration and beside the installation's own, and the one
/// that is in force.
pub async fn list(resolver: &mut Resolver) -> Vec<Listed> {
    let installation = resolver.installation().clone();
    let in_force = installation.find(None, &mut Watch::new()).ok().map(|found| found.file);
    let named = installation.configuration_dirs().into_iter().flat_map(configurations_in);
    let files: BTreeSet<_> = named.filter_map(|path| path.canonicalize().ok()).chain(in_force.clone()).collect();
    let mut listed = Vec::new();
    for file in files {
        let found = Found { link: link(&installation).to_owned(), file };
        let (config, problems) = resolver.examine_found(&found).await;
        listed.push(Listed {
            hypervisor: Some(config.hypervisor.clone()).filter(|name| !name.is_empty()),
            in_force: in_force.as_ref() == Some(&found.file),
            path: found.file,
            config,
            problems,
        });
    }
    listed
}

/// Puts `wanted` in force: the absolute path of a configuration, or the name of a hypervisor whose
/// `configuration-<name>.toml` is meant.
///
/// # Errors
/// When it has problems, or the link cannot be replaced; what was in force stays so.
pub async fn use_configuration(resolver: &mut Resolver, wanted: &str) -> Result<Switched, Error> {
    let target = if wanted.contains('/') { PathBuf::from(wanted) } else { find(resolver.installation(), wanted)? };
    let link = link(resolver.installation()).to_owned();
    let file = Found::at(&target, &mut Watch::new()).map_err(Problems::from)?.file;
    // A link to itself would lead nowhere.
    let target = if target == link { file.clone() } else { target };
    resolver.resolve_found(&Found { link: link.clone(), file }).await?;
    let target = if target.parent() == link.parent() { target.file_name().map(PathBuf::from) } else { Some(target) };
    replace(&link, target)
}

/// Puts in force what was before the last switch, so that a second call takes back the first.
///
/// # Errors
/// When nothing was in force before, or what was has problems now.
pub async fn use_previous(resolver: &mut Resolver) -> Result<Switched, Error> {
    let link = link(resolver.installation()).to_owned();
    let target = previous(history(&link)?, current(&link)?.as_deref());
    let Some(target) = target else { return Err(Error::NoPrevious { link }) };
    let shipped = resolver.installation().configurations.get(1);
    if let Some(target) = target.as_ref().map(|target| link.with_file_name(target)).as_ref().or(shipped) {
        let file = Found::at(target, &mut Watch::new()).map_err(Problems::from)?.file;
        resolver.resolve_found(&Found { link: link.clone(), file }).await?;
    }
    replace(&link, target)
}

/// The administrator's configuration.
fn link(installation: &Installation) -> &Path {
    installation.configurations.first().map_or(Path::new(ADMINISTRATOR_FILE), PathBuf::as_path)
}

fn configurations_in(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| name.starts_with("configuration-") && name.ends_with(".toml"))
        .map(|name| dir.join(name))
        .collect()
}

/// The configuration of the hypervisor `name`, which may be any of its names.
fn find(installation: &Installation, name: &str) -> Result<PathBuf, Error> {
    let canonical = hypervisor::canonical(name);
    let synonym = KNOWN.iter().find(|known| known.name == canonical).and_then(|known| known.synonym);
    let names: Vec<_> = [Some(canonical), synonym].into_iter().flatten().collect();
    let dirs = installation.configuration_dirs();
    let candidates: Vec<_> =
        dirs.iter().flat_map(|dir| names.iter().map(|name| dir.join(format!("configuration-{name}.toml")))).collect();
    candidates.iter().find(|file| file.is_file()).cloned().ok_or_else(|| Error::Unknown {
        name: quote(name),
        looked: candidates.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", "),
        suggestion: if hypervisor::is_known(canonical) {
            String::new()
        } else {
            suggest(name, KNOWN.iter().flat_map(|known| [Some(known.name), known.synonym]).flatten())
        },
    })
}

/// Lets one switch at a time through.
fn lock(link: &Path) -> Result<Flock<File>, Error> {
    let dir = link.parent().unwrap_or(Path::new("/"));
    let lock = || {
        fs::create_dir_all(dir)?;
        Flock::lock(File::open(dir)?, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))
    };
    lock().map_err(|source| Error::Write { attempt: "lock", path: dir.to_owned(), source })
}

/// What the link names.
fn current(link: &Path) -> Result<Option<PathBuf>, Error> {
    match fs::read_link(link) {
        Ok(target) => Ok(Some(target)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(Error::NoLink { link: link.to_owned() }),
        Err(source) => Err(Error::Write { attempt: "read link", path: link.to_owned(), source }),
    }
}

/// Targets in the order in which they were chosen; an empty line is no link.
fn history(link: &Path) -> Result<Vec<Option<PathBuf>>, Error> {
    let path = history_file(link);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().map(|line| (!line.is_empty()).then(|| PathBuf::from(line))).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(Error::Write { attempt: "read", path, source }),
    }
}

/// What was chosen before `current`, by a history whose last line may be a switch that never happened.
fn previous(mut history: Vec<Option<PathBuf>>, current: Option<&Path>) -> Option<Option<PathBuf>> {
    if let Some(at) = history.iter().rposition(|target| target.as_deref() == current) {
        history.truncate(at);
    }
    history.pop()
}

/// The history first, then the link, each in one step.
fn replace(link: &Path, target: Option<PathBuf>) -> Result<Switched, Error> {
    let _lock = lock(link)?;
    let before = current(link)?;
    let mut history = history(link)?;
    if let Some(at) = history.iter().rposition(|old| *old == before) {
        history.truncate(at);
    }
    history.extend([before.clone(), target.clone()]);
    let lines = history[history.len().saturating_sub(MAX_HISTORY)..].iter().map(|target| match target {
        Some(target) => format!("{}\n", target.display()),
        None => "\n".to_owned(),
    });
    let path = history_file(link);
    let written = atomic::write(&path, lines.collect::<String>().as_bytes());
    written.map_err(|source| Error::Write { attempt: "write", path, source })?;

    let switched = match &target {
        Some(target) => atomic::link(link, target),
        None if before.is_some() => fs::remove_file(link),
        None => Ok(()),
    };
    switched.map_err(|source| Error::Write { attempt: "replace link", path: link.to_owned(), source })?;
    let absolute = |target: PathBuf| link.with_file_name(target);
    Ok(Switched { now: target.map(absolute), before: before.map(absolute) })
}

fn history_file(link: &Path) -> PathBuf {
    link.with_extension("history")
}
