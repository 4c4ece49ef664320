//! This machine's folders for the test host: virtiofsd over a tree that has these folders, at their paths, and nothing
//! else.

use std::{
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};

use super::child::ChildGuard;

/// In a mount namespace of its own: binds each folder up to `--` into an empty tree at the first argument, and executes
/// the rest.
const SCRIPT: &str = r#"
set -e
tree=$1
shift
mount -t tmpfs tmpfs "$tree"
while [ "$1" != -- ]; do
    mkdir -p "$tree$1"
    mount --bind "$1" "$tree$1"
    shift
done
shift
exec "$@"
"#;
/// Covered in that namespace only, and a folder that nobody has a checkout in.
const TREE: &str = "/dev/shm";
const LISTENER_FD: i32 = 3;

/// The running virtiofsd.
#[derive(Debug)]
pub struct Share {
    socket: String,
    _virtiofsd: ChildGuard,
}

impl Share {
    /// Starts it; it listens already.
    pub fn start(virtiofsd: &Path, folders: &[PathBuf]) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let socket = format!("caisson-test-host-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let address = SocketAddr::from_abstract_name(&socket).context("name virtiofsd's socket")?;
        let listener = UnixListener::bind_addr(&address).context("listen for virtiofsd")?;

        let mut command = ChildGuard::command("unshare");
        command.args(["--mount", "--propagation=private", "sh", "-c", SCRIPT, "sh", TREE]).args(folders).arg("--");
        command.arg(virtiofsd).arg(format!("--fd={LISTENER_FD}")).arg(format!("--shared-dir={TREE}"));
        // Nothing in there changes for the guest while it runs.
        command.args([
            "--readonly",
            "--cache=always",
            "--sandbox=none",
            "--no-announce-submounts",
            "--log-level=error",
        ]);
        let mapping = FdMapping { parent_fd: OwnedFd::from(listener), child_fd: LISTENER_FD };
        command.fd_mappings(vec![mapping]).context("pass virtiofsd its socket")?;
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self { socket, _virtiofsd: ChildGuard::spawn(command)? })
    }

    /// Its name, in the abstract namespace (`unix(7)`): there is no file.
    pub fn socket(&self) -> &str {
        &self.socket
    }
}
