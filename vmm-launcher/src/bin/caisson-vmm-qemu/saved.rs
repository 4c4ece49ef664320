//! A VM as a file: QEMU's migration stream, `docs/devel/migration.rst` of QEMU, to a disk instead of another host.
//!
//! QEMU connects to a socket of the launcher to save, since its sandbox lets it start no program; to restore it reads a
//! descriptor that it inherits.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_protocol::listen;
use caisson_vmm_launcher::{Error, Result, qmp::Qmp, sockets::Sockets};
use serde_json::{Value, json};
use tokio::{net::UnixListener, sync::broadcast::Receiver, time::timeout};

/// In the snapshot's directory.
const FILE: &str = "qemu.migration";
/// In the run directory.
const SOCKET: &str = "migration.sock";
/// A gigabyte takes a few seconds.
const DEADLINE: Duration = Duration::from_secs(120);
/// QEMU would leave most of the disk's bandwidth to the guest, which stands still.
const BYTES_PER_SECOND: u64 = 1 << 40;

/// Writes a paused VM to `directory`.
pub async fn save(directory: &Path, run_dir: &Path, qmp: &Qmp) -> Result<()> {
    let file = file(directory);
    // All of the guest's memory is in it.
    let made = File::options().write(true).create_new(true).mode(0o600).open(&file);
    let made = made.map_err(Error::host(format!("make {}", file.display())))?;
    let saved = write(made, run_dir, qmp).await;
    if saved.is_err() {
        let _ = std::fs::remove_file(file);
    }
    saved
}

async fn write(file: File, run_dir: &Path, qmp: &Qmp) -> Result<()> {
    let path = run_dir.join(SOCKET);
    let listener = bind(&path).map_err(Error::host(format!("listen on {}", path.display())))?;
    let _removed = Sockets(vec![path.clone()]);
    let mut events = qmp.events();
    let moved = async {
        prepare(qmp).await?;
        qmp.execute("migrate", json!({ "uri": format!("unix:{}", path.display()) })).await?;
        completed(&mut events, "save", qmp).await
    };
    let copied = async { copy(&listener, file).await.map_err(Error::host("write the snapshot")) };
    let done = timeout(DEADLINE, async { tokio::try_join!(moved, copied) }).await;
    match done {
        Ok(done) => done.map(drop),
        Err(_) => {
            let seconds = DEADLINE.as_secs();
            qmp.execute("migrate_cancel", json!({})).await?;
            Err(Error::Hypervisor(format!("QEMU did not save the VM within {seconds} s")))
        }
    }
}

/// In place of what a snapshot that was broken off may have left.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let listener = listen::bind(path)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// From the first connection to `file`, until it ends.
async fn copy(listener: &UnixListener, mut file: File) -> io::Result<()> {
    let (stream, _) = listener.accept().await?;
    let mut stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let copied = tokio::task::spawn_blocking(move || {
        io::copy(&mut stream, &mut file)?;
        file.sync_all()
    });
    copied.await?
}

/// A saved VM.
#[derive(Debug)]
pub struct Saved(OwnedFd);

impl Saved {
    /// The one in `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = file(directory);
        let file = File::open(&path).map_err(|source| Error::File { what: "snapshot", path, source })?;
        Ok(Self(file.into()))
    }

    /// For QEMU to inherit.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }
}

/// Has a QEMU that waits for it read the VM from `uri`.
pub async fn load(uri: &str, qmp: &Qmp) -> Result<()> {
    let mut events = qmp.events();
    let loaded = async {
        prepare(qmp).await?;
        qmp.execute("migrate-incoming", json!({ "uri": uri })).await?;
        completed(&mut events, "restore", qmp).await
    };
    timeout(DEADLINE, loaded).await.unwrap_or_else(|_| {
        let seconds = DEADLINE.as_secs();
        Err(Error::Hypervisor(format!("QEMU did not restore the VM within {seconds} s")))
    })
}

fn file(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

async fn prepare(qmp: &Qmp) -> Result<()> {
    let events = json!([{ "capability": "events", "state": true }]);
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": events })).await?;
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": BYTES_PER_SECOND })).await.map(drop)
}

/// Waits for the end of a migration.
async fn completed(events: &mut Receiver<Value>, verb: &str, qmp: &Qmp) -> Result<()> {
    let how = qmp.wait(events, |event| match event["data"]["status"].as_str() {
        Some(how @ ("completed" | "failed" | "cancelled")) if event["event"] == "MIGRATION" => Some(Ok(how.to_owned())),
        _ => None,
    });
    let how = how.await?;
    if how == "completed" {
        return Ok(());
    }
    let told = qmp.execute("query-migrate", json!({})).await?;
    let why = told["error-desc"].as_str().unwrap_or(&how);
    Err(Error::Hypervisor(format!("QEMU did not {verb} the VM: {why}")))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::PermissionsExt, os::unix::net::UnixStream};

    use super::*;
    use crate::fake;

    /// A paused QEMU whose VM is "memory".
    fn paused() -> Qmp {
        fake::qmp(|command, arguments| match command {
            "migrate" => {
                let path = arguments["uri"].as_str().unwrap().strip_prefix("unix:").unwrap();
                UnixStream::connect(path).unwrap().write_all(b"memory").unwrap();
                vec![fake::done(), json!({ "event": "MIGRATION", "data": { "status": "completed" } })]
            }
            _ => vec![fake::done()],
        })
    }

    #[tokio::test]
    async fn only_its_owner_reads_a_saved_vm() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), dir.path(), &paused()).await.unwrap();
        assert_eq!(std::fs::read(file(dir.path())).unwrap(), b"memory");
        let mode = std::fs::metadata(file(dir.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!dir.path().join(SOCKET).exists());
    }

    #[tokio::test]
    async fn what_a_broken_off_snapshot_has_left_hinders_none() {
        let dir = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(dir.path().join(SOCKET)).unwrap());
        save(dir.path(), dir.path(), &paused()).await.unwrap();
    }

    #[tokio::test]
    async fn a_qemu_that_ends_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let qmp = fake::qmp(|command, _| match command {
            "migrate" => vec![fake::done(), Value::Null],
            _ => vec![fake::done()],
        });
        assert_eq!(save(dir.path(), dir.path(), &qmp).await.unwrap_err().to_string(), "QEMU has ended");
        assert!(!file(dir.path()).exists());
    }
}
