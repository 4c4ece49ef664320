//! A process's standard streams: from containerd's fifos to the connections that the guest dials, moved by the kernel.

use std::{
    fs::{File, OpenOptions},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    time::Duration,
};

use caisson_protocol::{address::GuestVsock, stream};
use nix::fcntl::OFlag;
use tokio::{task::JoinHandle, time::timeout};
use tracing::warn;

use crate::{Error, Result};

/// Where containerd has the streams; an empty name is a stream that nobody wants.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    /// Read by the process.
    pub stdin: String,
    /// Written by the process.
    pub stdout: String,
    /// Written by the process; unused with a terminal.
    pub stderr: String,
}

/// Running streams; they end when this is dropped.
#[derive(Debug, Default)]
pub struct Stdio {
    /// While this end is open the process's input does not end, whoever leaves.
    stdin_writer: Option<File>,
    stdin: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
}

impl Stdio {
    /// Opens containerd's ends and listens for the guest; answers what the guest shall dial for each.
    pub fn open(vsock: &GuestVsock, paths: &Paths) -> Result<(Self, Paths)> {
        let mut stdio = Self::default();
        let mut dial = Paths::default();
        if !paths.stdin.is_empty() {
            let reader = open_fifo(&paths.stdin, OpenOptions::new().read(true))?;
            stdio.stdin_writer = Some(open_fifo(&paths.stdin, OpenOptions::new().write(true))?);
            let (address, task) = connect(vsock, Direction::ToGuest(reader.into()))?;
            dial.stdin = address;
            stdio.stdin = Some(task);
        }
        for (path, dial) in [(&paths.stdout, &mut dial.stdout), (&paths.stderr, &mut dial.stderr)] {
            if !path.is_empty() {
                let (address, task) = connect(vsock, Direction::FromGuest(open_output(path)?))?;
                *dial = address;
                stdio.outputs.push(task);
            }
        }
        Ok((stdio, dial))
    }

    /// Ends the process's input once what is in the fifo has been read.
    pub fn close_stdin(&mut self) {
        self.stdin_writer = None;
    }

    /// Waits until all output is with containerd, at most for `limit`: a reader that has left never takes it.
    pub async fn drain(mut self, limit: Duration) {
        let outputs = std::mem::take(&mut self.outputs);
        let aborts: Vec<_> = outputs.iter().map(JoinHandle::abort_handle).collect();
        let all = async {
            for output in outputs {
                // A copy that failed has said so.
                let _ = output.await;
            }
        };
        if timeout(limit, all).await.is_err() {
            warn!("output was not taken in time and is lost");
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.stdin.iter().chain(&self.outputs).for_each(JoinHandle::abort);
    }
}

enum Direction {
    ToGuest(OwnedFd),
    FromGuest(OwnedFd),
}

/// Listens for one call and then moves bytes until one side ends.
fn connect(vsock: &GuestVsock, direction: Direction) -> Result<(String, JoinHandle<()>)> {
    let listener = vsock.listen_for_stream().map_err(Error::host("listen for a standard stream"))?;
    let address = listener.address().to_string();
    let task = tokio::spawn(async move {
        let work = async {
            let guest = listener.accept().await?.into_fd()?;
            drop(listener);
            match direction {
                Direction::ToGuest(fifo) => stream::copy(fifo, guest).await,
                Direction::FromGuest(fifo) => stream::copy(guest, fifo).await,
            }
        };
        if let Err(error) = work.await {
            warn!(%error, "a standard stream broke");
        }
    });
    Ok((address, task))
}

fn open_output(path: &str) -> Result<OwnedFd> {
    match path.split_once("://") {
        None => {
            // Open for both, so that neither this nor the process fails while containerd is being restarted.
            Ok(open_fifo(path, OpenOptions::new().read(true).write(true))?.into())
        }
        Some(("file", path)) => {
            let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
            Ok(file.map_err(Error::host(format!("open the log file {path}")))?.into())
        }
        Some((scheme, _)) => Err(Error::Unsupported(format!(
            "standard streams of kind {scheme}:// are not supported; use a fifo or file://"
        ))),
    }
}

fn open_fifo(path: &str, options: &mut OpenOptions) -> Result<File> {
    let file = options.custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    file.map_err(Error::host(format!("open the fifo {path}")))
}
