//! Makes a container's process: the agent's side.
//!
//! The work is done by a **maker**, this program started a second time with one thread and without a runtime, because
//! it clones, changes namespaces and keeps running in between. See [`crate::maker`] for its side.
//!
//! ```text
//! agent ──spawn──► maker ──clone──► the process (waits at its gate)
//!       ──Order──►
//!       ◄─Answer──  pid               the agent now watches the pid
//!       ──close──►  exits             the process becomes the agent's child
//!       ──gate───────────────────────► the program runs
//! ```

use std::{
    io::IoSliceMut,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    cmsg_space,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open},
    sys::{
        socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg},
        stat::Mode,
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::oneshot,
    time::timeout,
};

use crate::{
    error::{Attempt, Error, Result},
    reaper::{Exit, Reaper},
    streams::Ends,
};

/// The first argument of a maker.
pub const MAKER: &str = "maker";
/// How long a maker may take; hooks have to fit in.
const LIMIT: Duration = Duration::from_secs(60);
/// An answer is a pid or a sentence.
const MAX_ANSWER: u64 = 64 * 1024;

/// What the maker is to make.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// The container.
    pub id: String,
    /// Holds `config.json` and `rootfs`.
    pub bundle: PathBuf,
    /// The container's cgroup, from the root of the tree.
    pub cgroup: PathBuf,
    /// Where the gate is to be.
    pub gate: PathBuf,
    /// Whether the process gets a terminal; otherwise its streams are the maker's.
    pub terminal: bool,
    /// What kind of process.
    pub kind: Kind,
}

/// A container's first process or a further one.
#[derive(Debug, Serialize, Deserialize)]
pub enum Kind {
    /// The one that the container is made for.
    Init,
    /// One more, beside the first one.
    Exec {
        /// The first one's pid.
        init: i32,
        /// The OCI process, JSON.
        process: String,
    },
}

/// What the maker has to say.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The process waits at its gate.
    Made {
        /// In the guest.
        pid: i32,
        /// Width and height in characters, when the container's configuration has them.
        console_size: Option<(u16, u16)>,
    },
    /// It could not be made.
    Failed(String),
}

/// A process that waits at its gate.
pub struct Made {
    /// In the guest.
    pub pid: Pid,
    /// How it will end.
    pub end: oneshot::Receiver<Exit>,
    /// Our side of its terminal.
    pub terminal: Option<OwnedFd>,
    /// The terminal's first size.
    pub console_size: Option<(u16, u16)>,
}

/// Has a process made.
///
/// # Errors
/// When it cannot be, in the maker's words.
pub async fn make(reaper: &Reaper, order: &Order, ends: Ends) -> Result<Made> {
    let (control, theirs) = StdStream::pair().attempt("make a socket pair")?;
    let (console, their_console) = StdStream::pair().attempt("make a socket pair")?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args([MAKER, &theirs.as_raw_fd().to_string(), &their_console.as_raw_fd().to_string()])
        .env_clear()
        .stdin(ends.stdin)
        .stdout(ends.stdout)
        .stderr(ends.stderr);
    for inherited in [&theirs, &their_console] {
        fcntl(inherited, FcntlArg::F_SETFD(FdFlag::empty())).attempt("pass a socket on")?;
    }
    let maker = command.spawn().attempt("start the maker of processes")?;
    let maker = Pid::from_raw(maker.id().cast_signed());
    let mut maker_end = reaper.watch(maker);
    // Our copies of its descriptors, and of the process's pipes.
    drop((command, theirs, their_console));

    let (pid, console_size, control) = match timeout(LIMIT, negotiate(control, order)).await {
        Ok(answer) => answer?,
        Err(_) => {
            let _ = nix::sys::signal::kill(maker, nix::sys::signal::Signal::SIGKILL);
            return Err(Error::TooLate(format!("the process of {} was not made within {LIMIT:?}", order.id)));
        }
    };
    let end = reaper.watch(pid);
    drop(control);
    // Once the maker has gone, the process is ours, and so is every copy of its pipes.
    let _ = timeout(LIMIT, &mut maker_end).await;
    let terminal = if order.terminal { Some(receive(&console)?) } else { None };
    Ok(Made { pid, end, terminal, console_size })
}

/// Opens the gate that the process waits at.
///
/// # Errors
/// When the process is no longer there.
pub async fn open_gate(gate: &Path) -> Result<()> {
    let (directory, name) = (gate.parent().unwrap_or(Path::new("/")), gate.file_name().unwrap_or_default());
    // A socket's address has 107 bytes at most, unix(7): go through the directory's descriptor.
    let directory =
        open(directory, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).attempt("open the container's directory")?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    let mut gate = UnixStream::connect(path).await.attempt(format_args!("start what waits at {}", gate.display()))?;
    gate.write_all(b"start container").await.attempt("start the process")
}

async fn negotiate(control: StdStream, order: &Order) -> Result<(Pid, Option<(u16, u16)>, UnixStream)> {
    control.set_nonblocking(true).attempt("use a socket")?;
    let mut control = UnixStream::from_std(control).attempt("use a socket")?;
    let mut line = serde_json::to_vec(order).map_err(|error| Error::Invalid(format!("describe a process: {error}")))?;
    line.push(b'\n');
    control.write_all(&line).await.attempt("order a process")?;
    let mut answer = String::new();
    BufReader::new(&mut control).take(MAX_ANSWER).read_line(&mut answer).await.attempt("hear from the maker")?;
    match serde_json::from_str(&answer) {
        Ok(Answer::Made { pid, console_size }) => Ok((Pid::from_raw(pid), console_size, control)),
        Ok(Answer::Failed(reason)) => Err(Error::Launch(reason)),
        Err(_) => Err(Error::Launch(format!("the maker of {}'s process ended without an answer", order.id))),
    }
}

/// The terminal's descriptor, which was sent before the answer was.
fn receive(console: &StdStream) -> Result<OwnedFd> {
    let mut name = [0; 64];
    let mut iov = [IoSliceMut::new(&mut name)];
    let mut space = cmsg_space!([std::os::fd::RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<UnixAddr>(console.as_raw_fd(), &mut iov, Some(&mut space), flags)
        .attempt("receive the process's terminal")?;
    let sent = message.cmsgs().attempt("receive the process's terminal")?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    sent.and_then(|fd| crate::sys::inherited(fd).ok())
        .ok_or_else(|| Error::Launch("the process's terminal was not passed on".into()))
}
