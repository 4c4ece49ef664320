//! A shell in the guest itself, for people who look for a fault. Off unless the host's configuration allows it.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

use caisson_protocol::guest::ConsoleRequest;
use nix::{
    fcntl::OFlag,
    pty::{grantpt, posix_openpt, ptsname_r, unlockpt},
    unistd::{Pid, setsid},
};

use crate::{
    error::{Attempt, Error, Result},
    reaper::Reaper,
    streams::Connections,
};

/// The first argument of the process that becomes the shell.
pub const CONSOLE: &str = "console";
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

/// Opens a shell on the stream that `request` names; it ends with the stream.
///
/// # Errors
/// When the guest has no shell, or nobody accepts.
pub async fn open(reaper: &Reaper, request: &ConsoleRequest) -> Result<()> {
    let shell = SHELLS.into_iter().find(|shell| Path::new(shell).exists());
    let shell =
        shell.ok_or_else(|| Error::NotFound("the guest has no shell: its root file system needs a /bin/sh".into()))?;
    // Both directions on one connection.
    let connections = Connections::dial_both(&request.stream).await?;
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).attempt("open a terminal")?;
    grantpt(&master).and_then(|()| unlockpt(&master)).attempt("open a terminal")?;
    let terminal = ptsname_r(&master).attempt("open a terminal")?;
    let child = Command::new("/proc/self/exe")
        .args([CONSOLE, &terminal, shell])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .attempt("start a shell")?;
    let end = reaper.watch(Pid::from_raw(child.id().cast_signed()));
    let streams = connections.into_terminal(OwnedFd::from(master))?;
    if let (Ok(columns @ 1..), Ok(rows @ 1..)) = (request.columns.try_into(), request.rows.try_into()) {
        streams.resize(columns, rows)?;
    }
    tokio::spawn(async move {
        let _ = end.await;
        drop(streams);
    });
    Ok(())
}

/// Becomes the shell; `arguments` are the terminal and the shell. Comes back only when that fails.
pub fn become_shell(arguments: &[String]) {
    let [terminal, shell] = arguments else { return };
    // The first terminal that a session's leader opens is the session's.
    if setsid().is_err() {
        return;
    }
    let Ok(terminal) = File::options().read(true).write(true).open(terminal) else { return };
    let (Ok(output), Ok(errors)) = (terminal.try_clone(), terminal.try_clone()) else { return };
    let _ = Command::new(shell)
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("TERM", "xterm")
        .current_dir("/")
        .stdin(terminal)
        .stdout(output)
        .stderr(errors)
        .exec();
}
