//! What Firecracker logs, and by that the first sign that its API can be used: it says so.

use std::{
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
    pub async fn connect(&self, socket: &Path) -> UnixStream {
        let mut grown = self.grown.clone();
        loop {
            if let Ok(stream) = UnixStream::connect(socket).await {
                return stream;
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
