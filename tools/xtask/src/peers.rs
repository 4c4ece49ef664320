//! Other people's hypervisors, which take part in KVM tests and benches where their programs are found.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use caisson_testbed::Installation;

/// A folder of programs, each named as its hypervisor; the PATH unless it is set.
pub const FOLDER: &str = "CAISSON_HYPERVISORS";
/// As their launchers call them.
pub const NAMES: [&str; 3] = ["cloud-hypervisor", "firecracker", "stratovirt"];

/// Those that were found, copied to one folder.
#[derive(Debug)]
pub struct Peers {
    /// For `$CAISSON_HYPERVISORS`.
    pub folder: PathBuf,
    /// Their names.
    pub found: Vec<&'static str>,
}

impl Peers {
    /// Looks for each.
    pub fn find(installation: &Installation) -> Result<Self> {
        let folder = installation.programs.join("test-kvm").join("hypervisors");
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let places = env::var_os(FOLDER).or_else(|| env::var_os("PATH")).unwrap_or_default();
        let places: Vec<PathBuf> = env::split_paths(&places).collect();
        let mut found = Vec::new();
        for name in NAMES {
            let copy = folder.join(name);
            match places.iter().map(|place| place.join(name)).find(|program| program.is_file()) {
                Some(program) => {
                    copy_program(&program, &copy)?;
                    found.push(name);
                }
                None if copy.exists() => {
                    fs::remove_file(&copy).with_context(|| format!("remove {}", copy.display()))?
                }
                None => {}
            }
        }
        Ok(Self { folder, found })
    }

    /// What [`Self::find`] has left in `$CAISSON_HYPERVISORS`, or wherever that is.
    pub fn as_prepared() -> Self {
        let folder = env::var_os(FOLDER).map(PathBuf::from).unwrap_or_default();
        let found = NAMES.into_iter().filter(|name| folder.join(name).is_file()).collect();
        Self { folder, found }
    }

    /// Those that were not found, and why that is.
    pub fn missing(&self) -> Vec<(String, String)> {
        let place = if env::var_os(FOLDER).is_some() { format!("${FOLDER}") } else { "the PATH".to_owned() };
        let missing = NAMES.iter().filter(|name| !self.found.contains(name));
        missing.map(|name| ((*name).to_owned(), format!("there is no program {name} in {place}"))).collect()
    }
}

fn copy_program(program: &Path, copy: &Path) -> Result<()> {
    if program == copy {
        return Ok(());
    }
    fs::copy(program, copy).map(drop).with_context(|| format!("copy {}", program.display()))
}
