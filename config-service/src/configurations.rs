//! The configurations in force: each resolved once, and again when one of its files changes.
//!
//! One that becomes broken while the service runs stays in force as it last was, as long as the files that it names
//! are there.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use tracing::{info, warn};

use crate::{
    problem::Problems,
    resolve::{Resolved, Resolver},
    watch::Watch,
};

/// How many are remembered; a host has a handful.
const MAX_REMEMBERED: usize = 64;

/// All configurations that were asked for, by the path in the request.
#[derive(Debug)]
pub struct Configurations {
    resolver: Resolver,
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

impl Configurations {
    /// None yet.
    pub fn new(resolver: Resolver) -> Self {
        Self { resolver, known: HashMap::new() }
    }

    /// The configuration in force at `requested` for a request that arrived at `arrived`: requests that waited for
    /// the same look share it.
    ///
    /// # Errors
    /// What is wrong with it, when it was never good or names files that are gone.
    pub async fn in_force(&mut self, requested: Option<&Path>, arrived: Instant) -> Result<Arc<Resolved>, Problems> {
        let known = self.look(requested, arrived).await;
        match (&known.found, &known.last_good) {
            (Err(_), Some(last_good)) if last_good.files_are_there() => Ok(last_good.clone()),
            (found, _) => found.clone(),
        }
    }

    /// Everything that is wrong with `requested` as its files are now; the last sentence says whether an older state
    /// is in force.
    pub async fn problems(&mut self, requested: Option<&Path>, arrived: Instant) -> Vec<String> {
        let known = self.look(requested, arrived).await;
        let Err(problems) = &known.found else { return Vec::new() };
        let mut sentences = problems.sentences();
        if known.last_good.as_ref().is_some_and(|last_good| last_good.files_are_there()) {
            sentences.push("the last good configuration stays in force".to_owned());
        }
        sentences
    }

    /// Whether anything is in force that could not be read again from the files.
    pub fn keeps_a_last_good(&self) -> bool {
        self.known.values().any(|known| known.found.is_err() && known.last_good.is_some())
    }

    async fn look(&mut self, requested: Option<&Path>, arrived: Instant) -> &Known {
        let key = requested.map(Path::to_owned);
        if self.known.get(&key).is_some_and(|known| known.is_fresh(arrived)) {
            return &self.known[&key];
        }
        // What is known stays where it is until more is known: a call may be given up while we look.
        let last_good = self.known.get(&key).and_then(|known| known.last_good.clone());
        if self.known.len() >= MAX_REMEMBERED {
            self.known.clear();
        }
        let (looked_at, mut watch) = (Instant::now(), Watch::new());
        let found = self.resolver.resolve_watched(requested, &mut watch).await.map(Arc::new);
        let last_good = match &found {
            Ok(resolved) => {
                info!(file = resolved.config.origin, "configuration read");
                Some(resolved.clone())
            }
            Err(problems) => {
                warn!(last_good_in_force = last_good.is_some(), "{problems}");
                last_good
            }
        };
        self.known.entry(key).insert_entry(Known { found, last_good, watch, looked_at }).into_mut()
    }
}

impl Known {
    fn is_fresh(&self, arrived: Instant) -> bool {
        let may_pass = self.found.as_ref().is_err_and(Problems::may_pass);
        self.looked_at >= arrived || (!may_pass && self.watch.is_unchanged())
    }
}
