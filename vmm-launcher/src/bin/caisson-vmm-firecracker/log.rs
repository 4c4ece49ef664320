//! What Firecracker logs, and by that the first sign that its API can be used: it says so.

use std::{
    io::ErrorKind,
    path::Path,
    sync::{Arc, Mutex},
};

use caisson_vmm_launcher::{Error, Result, tail::Tail};
use tokio::{
    io::AsyncReadExt,
    net::{UnixStream, unix::pipe::Receiver},
    sync::watch,
    task::AbortHandle,
};

use crate::layout::open_pipe;

/// The log of one Firecracker.
#[derive(Debug)]
pub struct Log {
    tail: Arc<Mutex<Tail>>,
    grown: watch::Receiver<()>,
    reader: AbortHandle,
}

impl Log {
    /// Reads from the named pipe `path`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn read(path: &Path) -> Result<Self> {
        let pipe = open_pipe(path);
        Ok(Self::over(pipe.map_err(Error::host(format!("open {}", path.display())))?))
    }

    /// Reads from `pipe`.
    pub fn over(mut pipe: Receiver) -> Self {
        let tail = Arc::new(Mutex::new(Tail::default()));
        let (tell, grown) = watch::channel(());
        let kept = tail.clone();
        let reader = tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
                kept.lock().expect("no reader panics").push(&buffer[..count]);
                tell.send_replace(());
            }
        });
        Self { tail, grown, reader: reader.abort_handle() }
    }

    /// Answers with a connection to Firecracker's API as soon as there can be one. Whoever calls watches Firecracker's
    /// process, and has a deadline.
    ///
    /// # Errors
    /// When there never can be one.
    pub async fn connect(&self, socket: &Path) -> Result<UnixStream> {
        let mut grown = self.grown.clone();
        loop {
            match UnixStream::connect(socket).await {
                Err(error) if [ErrorKind::NotFound, ErrorKind::ConnectionRefused].contains(&error.kind()) => {}
                connected => return connected.map_err(Error::host(format!("connect to {}", socket.display()))),
            }
            // "Listening on API socket" is what it says when it does. The other end is never dropped.
            let _ = grown.changed().await;
        }
    }

    /// Its last lines.
    pub fn text(&self) -> String {
        self.tail.lock().expect("no reader panics").text()
    }

    /// Forgets what was said until now.
    pub fn forget(&self) {
        *self.tail.lock().expect("no reader panics") = Tail::default();
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[cfg(test)]
mod tests {
    use caisson_vmm_launcher::process::lasting_pipe;
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_waited_for_until_the_log_grows() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("firecracker.sock");
        let (near, far) = lasting_pipe().unwrap();
        let log = Log::over(near);
        let listens = async {
            let _listener = UnixListener::bind(&socket).unwrap();
            std::io::Write::write_all(&mut std::fs::File::from(far), b"Listening on API socket\n").unwrap();
            std::future::pending::<()>().await
        };
        tokio::select! {
            biased;
            connected = log.connect(&socket) => drop(connected.unwrap()),
            () = listens => {}
        }
    }

    #[tokio::test]
    async fn what_can_never_be_connected_to_is_told() {
        let (near, _far) = lasting_pipe().unwrap();
        let socket = Path::new("/etc/passwd/firecracker.sock");
        let error = Log::over(near).connect(socket).await.unwrap_err().to_string();
        assert_eq!(error, "connect to /etc/passwd/firecracker.sock");
    }
}
