//! Which Firecracker it is: what it can do depends on that.

use std::{fmt, path::Path, process::Stdio, time::Duration};

use caisson_vmm_launcher::{Error, Result};
use tokio::{process::Command, time::timeout};

const DEADLINE: Duration = Duration::from_secs(10);

/// The oldest whose API has what is sent: serial numbers of disks, `PATCH` of drives, hybrid vsock.
pub const OLDEST: Version = Version { major: 1, minor: 10 };
/// The first with `/pmem`, `/hotplug/memory` and the balloon's free page reporting.
pub const WITH_PMEM: Version = Version { major: 1, minor: 14 };
/// The first that boots a bzImage.
pub const WITH_BZIMAGE: Version = Version { major: 1, minor: 17 };

/// As far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
}

impl Version {
    /// From `1.17.0-dev`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split('.');
        let (major, minor) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        Some(Self { major, minor })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)
    }
}

/// What the executable at `path` says.
///
/// # Errors
/// When it cannot be executed, or is something else or too old.
pub async fn of(path: &Path) -> Result<(Version, String)> {
    let run = Command::new(path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(DEADLINE, run)
        .await
        .map_err(|_| Error::Hypervisor(format!("{} --version does not end", path.display())))?
        .map_err(Error::host(format!("execute {}", path.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let word = text.lines().next().and_then(|line| line.strip_prefix("Firecracker v"));
    match word.and_then(|word| Some((Version::parse(word)?, word.to_owned()))) {
        Some((version, word)) if version >= OLDEST => Ok((version, word)),
        Some((_, word)) => Err(Error::Invalid(format!(
            "{} is Firecracker {word}, which is too old: {OLDEST} or newer is needed",
            path.display()
        ))),
        None => Err(Error::Invalid(format!("{} is not Firecracker: --version does not say so", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(Version::parse("1.17.0-dev") > Version::parse("1.9.1"));
        assert_eq!(Version::parse("1.14.0").map(|version| version >= WITH_PMEM), Some(true));
    }

    #[test]
    fn what_is_no_version_is_none() {
        assert_eq!(Version::parse("latest"), None);
    }
}
