//! From a request to a configuration, in one pass over the files.

use std::path::{Path, PathBuf};

use caisson_protocol::config::SandboxConfig;

use crate::{
    backend::Backends,
    check::{self, Setting},
    hypervisor,
    installation::Installation,
    load::load,
    problem::Problems,
    rules,
    watch::Watch,
};

/// A configuration without problems.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// What the shim gets.
    pub config: SandboxConfig,
    /// Every value of it, and where it comes from.
    pub settings: Vec<Setting>,
    files: Vec<PathBuf>,
}

impl Resolved {
    /// Whether the files that it names still exist.
    pub(crate) fn files_are_there(&self) -> bool {
        self.files.iter().all(|file| file.exists())
    }
}

/// Resolves requests against the files of one installation. Remembers only what launchers told of themselves.
#[derive(Debug)]
pub struct Resolver {
    installation: Installation,
    backends: Backends,
}

impl Resolver {
    /// For `installation`.
    pub fn new(installation: Installation) -> Self {
        Self { installation, backends: Backends::default() }
    }

    /// Resolves `requested`, or the configuration that the lookup order finds.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub async fn resolve(&mut self, requested: Option<&Path>) -> Result<Resolved, Problems> {
        self.resolve_watched(requested, &mut Watch::new()).await
    }

    pub(crate) async fn resolve_watched(
        &mut self,
        requested: Option<&Path>,
        watch: &mut Watch,
    ) -> Result<Resolved, Problems> {
        let file = self.installation.find(requested, watch)?;
        let document = match load(&file, watch) {
            Ok(document) => document,
            Err(found) => return Err(Problems::of(Some(&file), found)),
        };

        let mut problems = Vec::new();
        let hypervisor = hypervisor::choose(&document).map_err(|problem| problems.push(problem)).ok();
        let options = match &hypervisor {
            Some(hypervisor) => self.backends.options(&self.installation, hypervisor, watch).await,
            None => Ok([].into()),
        };
        let options = options.map_err(|problem| problems.push(problem)).ok();

        let mut checked = check::check(&document, hypervisor.as_ref(), options.as_deref());
        rules::examine(&mut checked, watch);
        checked.problems.append(&mut problems);
        if !checked.problems.is_empty() {
            return Err(Problems::of(Some(&file), checked.problems));
        }
        let origin = file.display().to_string();
        let config = SandboxConfig { origin, ..checked.config };
        let files = checked.files.into_iter().map(|file| file.path).collect();
        Ok(Resolved { config, settings: checked.settings, files })
    }
}
