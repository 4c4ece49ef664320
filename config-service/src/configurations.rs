//! The configurations in force: each resolved once, and again when one of its files changes.
//!
//! One that becomes broken stays in force as it last was, as long as the files that it names are there.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use tracing::{info, warn};

use crate::{
    last_good::{Kept, LastGood},
    load,
    problem::Problems,
    resolve::{Resolved, Resolver},
    watch::Watch,
};

/// How many are remembered; a host has a handful.
const MAX_REMEMBERED: usize = 64;
const OLDER_STATE: &str = "the last good configuration stays in force";

/// All configurations that were asked for, by the path in the request.
#[derive(Debug)]
pub struct Configurations {
    /// For everything that is not about what is in force.
    pub resolver: Resolver,
    kept: LastGood,
    known: HashMap<Option<PathBuf>, Known>,
}

/// What was last found at one path.
#[derive(Debug)]
struct Known {
    found: Result<Arc<Resolved>, Problems>,
    last_good: Option<Arc<Resolved>>,
    watch: Watch,
    looked_at: Instant,
}

/// What is known of one configuration at one moment.
#[derive(Debug)]
pub struct InForce {
    /// What a sandbox gets, or why it gets none.
    pub resolved: Result<Arc<Resolved>, Problems>,
    /// What is wrong with the files as they are now; the last sentence says so when an older state is in force.
    pub problems: Vec<String>,
    /// Whether an older state is in force.
    pub last_good: bool,
    /// The files that this depends on.
    pub files: Vec<PathBuf>,
}

impl Configurations {
    /// None yet; what was last good is kept in `state_dir`, and may be there from before.
    pub fn new(resolver: Resolver, state_dir: PathBuf) -> Self {
        Self { resolver, kept: LastGood::in_dir(state_dir), known: HashMap::new() }
    }

    /// The configuration at `requested` for a request that arrived at `arrived`: requests that waited for the same
    /// look share it.
    pub async fn in_force(&mut self, requested: Option<&Path>, arrived: Instant) -> InForce {
        let known = self.look(requested, arrived).await;
        let last_good = known.last_good.as_ref().filter(|last_good| last_good.files_are_there());
        let files = known.watch.paths();
        match (&known.found, last_good) {
            (Ok(good), _) => InForce { resolved: Ok(good.clone()), problems: Vec::new(), last_good: false, files },
            (Err(problems), Some(good)) => {
                let problems = problems.sentences().into_iter().chain([OLDER_STATE.to_owned()]).collect();
                InForce { resolved: Ok(good.clone()), problems, last_good: true, files }
            }
            (Err(problems), None) => {
                InForce { resolved: Err(problems.clone()), problems: problems.sentences(), last_good: false, files }
            }
        }
    }

    async fn look(&mut self, requested: Option<&Path>, arrived: Instant) -> &Known {
        let key = requested.map(Path::to_owned);
        let now = Instant::now();
        let fresh = self.known.get_mut(&key).is_some_and(|known| {
            let fresh = known.is_fresh(arrived);
            if fresh {
                known.looked_at = known.looked_at.max(now);
            }
            fresh
        });
        if fresh {
            return &self.known[&key];
        }
        // What is known stays where it is until more is known: a call may be given up while we look.
        let last_good = self.known.get(&key).and_then(|known| known.last_good.clone());
        if self.known.len() >= MAX_REMEMBERED {
            self.known.clear();
        }
        let mut watch = Watch::new();
        let found = self.read(requested, &mut watch).await.map(Arc::new);
        let last_good = match (&found, last_good) {
            (Ok(resolved), _) => {
                info!(file = resolved.config.origin, "configuration read");
                Some(resolved.clone())
            }
            (Err(problems), last_good) => {
                let last_good = if last_good.is_some() { last_good } else { self.read_kept(requested).await };
                warn!(last_good_in_force = last_good.is_some(), "{problems}");
                last_good
            }
        };
        self.known.entry(key).insert_entry(Known { found, last_good, watch, looked_at: now }).into_mut()
    }

    /// Reads the files, and keeps them when they are good.
    async fn read(&mut self, requested: Option<&Path>, watch: &mut Watch) -> Result<Resolved, Problems> {
        let found = self.resolver.installation().find(requested, watch)?;
        let layers = load::read(&found, watch).map_err(|problems| Problems::of(Some(&found.file), problems))?;
        let resolved = self.resolver.resolve_layers(&found.file, &layers, watch).await?;
        if let Err(error) = self.kept.keep(requested, &Kept { file: found.file, layers }) {
            warn!(%error, "the configuration is not kept for a time when it is broken");
        }
        Ok(resolved)
    }

    /// What a process before this one kept.
    async fn read_kept(&mut self, requested: Option<&Path>) -> Option<Arc<Resolved>> {
        let Kept { file, layers } = self.kept.find(requested)?;
        self.resolver.resolve_layers(&file, &layers, &mut Watch::new()).await.ok().map(Arc::new)
    }
}

impl Known {
    fn is_fresh(&self, arrived: Instant) -> bool {
        let may_pass = self.found.as_ref().is_err_and(Problems::may_pass);
        self.looked_at >= arrived || (!may_pass && self.watch.is_unchanged())
    }
}
