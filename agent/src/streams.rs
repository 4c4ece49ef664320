//! A process's standard streams: the connections to the host, and the pipes or the terminal that the process sees.

use std::{
    os::fd::{AsFd, OwnedFd},
    process::Stdio,
    time::Duration,
};

use caisson_protocol::{address::Address, stream::copy};
use nix::{fcntl::OFlag, unistd::pipe2};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::{
    task::{AbortHandle, JoinHandle},
    time::timeout,
};
use tracing::debug;

use crate::error::{Attempt, Error, Result};

/// How long the host may take to accept a connection that it asked for.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// Connections to the host, one for each stream that somebody wants.
pub struct Connections {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Connections {
    /// Dials what the three addresses name; an empty one is nobody's.
    ///
    /// # Errors
    /// When an address is none, or nobody accepts.
    pub async fn dial(stdin: &str, stdout: &str, stderr: &str) -> Result<Self> {
        let (stdin, stdout, stderr) =
            tokio::try_join!(connect("stdin", stdin), connect("stdout", stdout), connect("stderr", stderr))?;
        Ok(Self { stdin, stdout, stderr })
    }

    /// Dials `address` once, for both directions.
    ///
    /// # Errors
    /// As for [`Self::dial`].
    pub async fn dial_both(address: &str) -> Result<Self> {
        let stdin = connect("console", address).await?;
        let stdin = stdin.ok_or_else(|| Error::Invalid("the console's address is empty".into()))?;
        let stdout = stdin.try_clone().attempt("duplicate the console's connection")?;
        Ok(Self { stdin: Some(stdin), stdout: Some(stdout), stderr: None })
    }

    /// Pipes: the process's ends, and the streams that keep them moving.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn into_pipes(self) -> Result<(Ends, Streams)> {
        let mut streams = Streams::default();
        let stdin = match self.stdin {
            Some(connection) => {
                let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).attempt("make a pipe")?;
                streams.input = Some(flow("stdin", connection, ours).abort_handle());
                theirs.into()
            }
            None => Stdio::null(),
        };
        let stdout = streams.outgoing("stdout", self.stdout)?;
        let stderr = streams.outgoing("stderr", self.stderr)?;
        Ok((Ends { stdin, stdout, stderr }, streams))
    }

    /// A terminal, whose `master` side is ours: everything the process says goes to stdout.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn into_terminal(self, master: OwnedFd) -> Result<Streams> {
        let duplicate = || master.try_clone().attempt("duplicate the terminal");
        let mut streams = Streams::default();
        if let Some(connection) = self.stdin {
            streams.input = Some(flow("terminal input", connection, duplicate()?).abort_handle());
        }
        if let Some(connection) = self.stdout {
            streams.outputs.push(flow("terminal output", duplicate()?, connection));
        }
        streams.terminal = Some(master);
        Ok(streams)
    }
}

/// The process's own ends.
pub struct Ends {
    /// Its standard input.
    pub stdin: Stdio,
    /// Its standard output.
    pub stdout: Stdio,
    /// Its standard error.
    pub stderr: Stdio,
}

impl Ends {
    /// Nothing to read, and nobody who listens.
    pub fn null() -> Self {
        Self { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() }
    }
}

/// Bytes on their way. Input stops when this goes; output goes on until its last writer has gone.
#[derive(Default)]
pub struct Streams {
    input: Option<AbortHandle>,
    outputs: Vec<JoinHandle<()>>,
    terminal: Option<OwnedFd>,
}

impl Streams {
    /// Sets the terminal's size in characters.
    ///
    /// # Errors
    /// When there is no terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let terminal = self.terminal.as_ref().ok_or_else(|| Error::WrongState("the process has no terminal".into()))?;
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(terminal.as_fd(), size).attempt(format_args!("set the terminal's size to {columns}x{rows}"))
    }

    /// What is to be waited for until all output has left.
    pub fn take_outputs(&mut self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut self.outputs)
    }

    fn outgoing(&mut self, name: &'static str, connection: Option<OwnedFd>) -> Result<Stdio> {
        let Some(connection) = connection else { return Ok(Stdio::null()) };
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).attempt("make a pipe")?;
        self.outputs.push(flow(name, ours, connection));
        Ok(theirs.into())
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        if let Some(input) = &self.input {
            input.abort();
        }
    }
}

async fn connect(name: &str, address: &str) -> Result<Option<OwnedFd>> {
    if address.is_empty() {
        return Ok(None);
    }
    let parsed: Address = address.parse().map_err(|error| Error::Invalid(format!("{name}: {error}")))?;
    let stream = timeout(DIAL_LIMIT, parsed.connect())
        .await
        .map_err(|_| Error::TooLate(format!("connect {name} to {address}: no answer within {DIAL_LIMIT:?}")))?
        .attempt(format_args!("connect {name} to {address}"))?;
    stream.into_fd().map(Some).attempt(format_args!("use the connection of {name}"))
}

fn flow(name: &'static str, from: OwnedFd, to: OwnedFd) -> JoinHandle<()> {
    tokio::spawn(async move {
        match copy(from, to).await {
            Ok(bytes) => debug!(name, bytes, "stream ended"),
            Err(error) => debug!(name, %error, "stream broke"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use tokio::{io::AsyncReadExt, io::AsyncWriteExt, net::UnixListener};

    #[tokio::test]
    async fn a_process_speaks_to_whom_the_addresses_name() {
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (dir.path().join("in"), dir.path().join("out"));
        let (stdin, stdout) = (UnixListener::bind(&input).unwrap(), UnixListener::bind(&output).unwrap());
        let address = |path: &std::path::Path| format!("unix:{}", path.display());
        let connections = Connections::dial(&address(&input), &address(&output), "").await.unwrap();
        let (ends, _streams) = connections.into_pipes().unwrap();

        let mut cat = Command::new("cat").stdin(ends.stdin).stdout(ends.stdout).stderr(ends.stderr).spawn().unwrap();

        let (mut stdin, mut stdout) = (stdin.accept().await.unwrap().0, stdout.accept().await.unwrap().0);
        stdin.write_all(b"hello").await.unwrap();
        drop(stdin);
        let mut heard = String::new();
        stdout.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "hello");
        assert!(cat.wait().unwrap().success());
    }

    #[tokio::test]
    async fn an_address_where_nobody_listens_is_named() {
        let error = Connections::dial("", "unix:/nowhere/x", "").await.err().unwrap();
        assert!(error.to_string().contains("connect stdout to unix:/nowhere/x"), "{error}");
    }

    #[tokio::test]
    async fn a_process_without_a_terminal_cannot_be_resized() {
        let error = Streams::default().resize(80, 24).unwrap_err();
        assert!(matches!(error, Error::WrongState(_)));
    }
}
