//! Which Firecracker it is: what it can do depends on that.

use std::{fmt, path::Path};

use caisson_vmm_launcher::{Error, Result, ask};

/// The oldest whose API has what is sent: serial numbers of disks, `PATCH` of drives, hybrid vsock.
pub const OLDEST: Version = Version { major: 1, minor: 10 };
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
pub async fn of(path: &Path) -> Result<String> {
    let word = ask::version(path, "--version", "Firecracker", "Firecracker v").await?;
    match Version::parse(&word) {
        Some(version) if version >= OLDEST => Ok(word),
        Some(_) => Err(Error::Invalid(format!(
            "{} is Firecracker {word}, which is too old: {OLDEST} or newer is needed",
            path.display()
        ))),
        None => Err(Error::Invalid(format!("{} is Firecracker {word}, which is no version", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(Version::parse("1.17.0-dev") > Version::parse("1.9.1"));
        assert_eq!(Version::parse("1.17.0-dev").map(|version| version >= WITH_BZIMAGE), Some(true));
    }

    #[test]
    fn what_is_no_version_is_none() {
        assert_eq!(Version::parse("latest"), None);
    }
}
