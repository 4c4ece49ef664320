//! Other people's programs that make file systems.

use std::{ffi::OsStr, io, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

use crate::{Error, Result};

/// For one image: a layer may hold many gigabytes, on a slow disk.
const LIMIT: Duration = Duration::from_secs(600);

/// What `strerror(3)` says of a full disk: all that a tool tells of it.
const NO_ROOM: [&str; 2] = ["No space left on device", "Disk quota exceeded"];

/// Runs `program`, of Debian's `package`, to its end; killed with the future. An error begins with `action`, and is
/// [`io::ErrorKind::StorageFull`] when there was no room for what it makes.
pub async fn run(action: &str, program: &str, package: &str, arguments: &[&OsStr]) -> Result<()> {
    let failed_for = |kind, why: String| Error::host(action)(io::Error::new(kind, why));
    let failed = |why| failed_for(io::ErrorKind::Other, why);
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    // Its words are looked at.
    command.env("LC_ALL", "C");
    let output = match timeout(LIMIT, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            return Err(failed(format!("there is no {program} on the PATH; install {package}")));
        }
        Ok(Err(error)) => return Err(failed(format!("execute {program}: {error}"))),
        Err(_) => return Err(failed(format!("{program} did not end within {} s", LIMIT.as_secs()))),
    };
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let last = words.trim().lines().last().unwrap_or("it said nothing");
    let is_full = NO_ROOM.iter().any(|no_room| words.contains(no_room));
    let kind = if is_full { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
    Err(failed_for(kind, format!("{program} ended with {}: {}", output.status, last.escape_debug())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_protocol::status::sentence;

    #[tokio::test]
    async fn a_program_that_is_not_there_names_its_package() {
        let error = run("make x", "mkfs.nothing", "nothing-utils", &[]).await.unwrap_err();
        assert_eq!(sentence(&error), "make x: there is no mkfs.nothing on the PATH; install nothing-utils");
    }

    #[tokio::test]
    async fn a_program_that_fails_is_quoted() {
        let arguments = ["-c", "echo first >&2; echo no space left >&2; exit 3"].map(OsStr::new);
        let error = run("make x", "sh", "dash", &arguments).await.unwrap_err();
        assert_eq!(sentence(&error), "make x: sh ended with exit status: 3: no space left");
    }

    #[tokio::test]
    async fn a_full_disk_is_told_from_another_failure() {
        let arguments = ["-c", "head -c1 /dev/zero > /dev/full"].map(OsStr::new);
        let error = run("make x", "sh", "dash", &arguments).await.unwrap_err();
        let Error::Host { source, .. } = error else { panic!("{error}") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull, "{source}");
    }
}
