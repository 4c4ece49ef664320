//! Changes a container's limits while it runs.

use std::path::Path;

use libcgroups::{
    common::{CgroupManager, ControllerOpt},
    v2::manager::Manager,
};
use oci_spec::runtime::LinuxResources;

use crate::{
    cgroup::{self, Cgroup},
    error::{Error, Result},
    spec::guest_resources,
};

/// Applies `asked`; what it does not name stays as it is.
///
/// # Errors
/// When the kernel refuses a value.
pub fn apply(cgroup: &Cgroup, asked: LinuxResources) -> Result<()> {
    let resources = guest_resources(asked);
    let options =
        ControllerOpt { resources: &resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    Manager::new(Path::new(cgroup::ROOT).to_owned(), cgroup.name().to_owned())
        .and_then(|manager| manager.apply(&options))
        .map_err(|error| Error::Invalid(format!("change the limits of {}: {error}", cgroup.path().display())))
}
