//! The recipe as steps: kernel, then what is built with its modules; each through the cache, then into the output.

use std::path::PathBuf;

use crate::agent::Agent;
use crate::cache::Cache;
use crate::error::Result;
use crate::manifest::{Artifact, Manifest};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::verity::Verity;
use crate::{initrd, kernel, output, rootfs};

/// Which artifacts to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `vmlinux`, `bzImage`, `kernel.config`.
    Kernel,
    /// `initrd.img`.
    Initrd,
    /// `rootfs.erofs` or `rootfs.ext4`.
    Rootfs,
    /// All of these.
    All,
}

/// What to build, from what, and where to.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which artifacts.
    pub target: Target,
    /// How to make them.
    pub recipe: Recipe,
    /// Where they go.
    pub output: PathBuf,
    /// The cache directory.
    pub cache: PathBuf,
    /// The agent, when it is not to be looked for.
    pub agent: Option<PathBuf>,
}

/// What was built.
#[derive(Clone, Debug)]
pub struct Report {
    /// The output directory's manifest, with what earlier calls built.
    pub manifest: Manifest,
    /// The artifacts of this call, and whether the cache had them.
    pub artifacts: Vec<(Artifact, bool)>,
    /// How to verify the root filesystem of this call, if it has a hash tree.
    pub verity: Option<Verity>,
}

/// Builds, or finds in the cache, and writes the output directory.
pub fn build(request: &Request, progress: &Progress) -> Result<Report> {
    let Request { target, recipe, .. } = request;
    // What can be wrong with the caller's files is said before anything is downloaded.
    let agent = match target {
        Target::Kernel => None,
        Target::Initrd | Target::Rootfs | Target::All => Some(Agent::find(request.agent.as_deref())?),
    };
    let cache = Cache::open(&request.cache)?;
    let kernel = kernel::build(&cache, &recipe.kernel, progress)?;
    let mut initrd = None;
    let mut rootfs = None;
    if let Some(agent) = &agent {
        if matches!(target, Target::Initrd | Target::All) {
            progress.step("making the initrd");
            initrd = Some(initrd::build(&cache, &recipe.initrd, &kernel, agent)?);
        }
        if matches!(target, Target::Rootfs | Target::All) {
            progress.step("making the root filesystem");
            rootfs = Some(rootfs::build(&cache, &recipe.rootfs, &kernel, agent, progress)?);
        }
    }

    progress.step(format!("writing {}", request.output.display()));
    let mut entries: Vec<output::Published> = Vec::new();
    if matches!(target, Target::Kernel | Target::All) {
        entries.push((&kernel, |manifest| &mut manifest.kernel, kernel::is_published));
    }
    if let Some(initrd) = &initrd {
        entries.push((initrd, |manifest| &mut manifest.initrd, |_| true));
    }
    if let Some(rootfs) = &rootfs {
        entries.push((rootfs, |manifest| &mut manifest.rootfs, |_| true));
    }
    let manifest = output::publish(&request.output, &entries)?;
    let artifacts = entries.iter().flat_map(|(entry, _, is_published)| {
        let published = entry.section.outputs.iter().filter(|artifact| is_published(&artifact.name));
        published.map(|artifact| (artifact.clone(), entry.reused))
    });
    let artifacts = artifacts.collect();
    Ok(Report { manifest, artifacts, verity: rootfs.as_ref().and_then(|rootfs| rootfs.section.verity.clone()) })
}
