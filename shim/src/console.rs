//! A shell in the guest for a person on the host: the guest dials one connection, the person's tool another, and the
//! kernel moves the bytes between them.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use caisson_protocol::{deadline, guest, paths::SandboxDir, stream};
use tokio::{net::UnixListener, time::timeout};
use tracing::debug;

use crate::{Error, Result, vm::Vm};

/// How long the person's tool may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Opens a shell in `vm`'s guest; answers the socket that takes one connection to it.
pub async fn open(vm: &Vm, dir: &SandboxDir, columns: u32, rows: u32) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let path = dir.path().join(format!("console-{}.sock", NEXT.fetch_add(1, Ordering::Relaxed)));
    let person = listen(&path).map_err(Error::host(format!("listen on {}", path.display())))?;
    let guest = connect_guest(vm, columns, rows).await.inspect_err(|_| remove(&path))?;
    let socket = path.clone();
    tokio::spawn(async move {
        let accepted = timeout(CONNECT_LIMIT, person.accept()).await;
        remove(&path);
        // Nobody came: the shell ends with its connection.
        let Ok(Ok((person, _))) = accepted else { return };
        let joined = async { join(person.into_std()?.into(), guest).await };
        if let Err(error) = joined.await {
            debug!(%error, "a console broke");
        }
    });
    Ok(socket)
}

async fn connect_guest(vm: &Vm, columns: u32, rows: u32) -> Result<OwnedFd> {
    let listener = vm.vsock.listen_for_stream().map_err(Error::host("listen for a console"))?;
    let request = guest::ConsoleRequest { stream: listener.address().to_string(), columns, rows, ..Default::default() };
    vm.guest.console(deadline(vm.request_limit), &request).await?;
    // The agent has dialled before it answered.
    let connected = async { listener.accept().await?.into_fd() };
    match timeout(vm.request_limit, connected).await {
        Ok(connected) => connected.map_err(Error::host("take the guest's console")),
        Err(_) => Err(Error::host("take the guest's console")(io::ErrorKind::TimedOut.into())),
    }
}

/// Moves bytes both ways until either side has ended.
async fn join(person: OwnedFd, guest: OwnedFd) -> io::Result<()> {
    let (typed, shown) = (person.try_clone()?, guest.try_clone()?);
    tokio::select! {
        end = stream::copy(typed, guest) => end.map(drop),
        end = stream::copy(shown, person) => end.map(drop),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

fn remove(path: &Path) {
    // It goes with the sandbox's directory otherwise.
    let _ = fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
        thread,
    };

    use super::*;

    #[tokio::test]
    async fn what_is_typed_reaches_the_guest_and_its_answer_comes_back_until_it_ends() {
        let (mut typist, person) = UnixStream::pair().unwrap();
        let (mut shell, guest) = UnixStream::pair().unwrap();
        let shell = thread::spawn(move || {
            let mut heard = [0; 3];
            shell.read_exact(&mut heard).unwrap();
            shell.write_all(b"Linux").unwrap();
            heard
        });
        typist.write_all(b"ls\n").unwrap();
        join(person.into(), guest.into()).await.unwrap();
        assert_eq!(&shell.join().unwrap(), b"ls\n");
        let mut shown = String::new();
        typist.read_to_string(&mut shown).unwrap();
        assert_eq!(shown, "Linux");
    }
}
