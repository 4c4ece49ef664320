//! One boot of the test host, for one command.

use std::{
    env,
    fs::File,
    io::{self, ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use caisson_test_host::{Frame, Job, Verdict};
use caisson_testbed::{Cache, Capture, Installation};

use super::{
    image::Image,
    machine::{Connections, Machine},
    share::Share,
};

/// Takes no room until it is written to.
const SCRATCH_BYTES: u64 = 32 << 30;
/// Variables of the environment that the command gets.
const VARIABLES: [&str; 4] = ["CAISSON_", "NEXTEST_", "RUST_", "TESTBED_"];
/// How long a pulse may be overdue, far more than a busy machine around it takes for one.
const STANDSTILL: Duration = Duration::from_secs(60);
/// How long the kernel's last words may take after the machine has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A test host that can be booted.
#[derive(Debug)]
pub struct TestHost {
    image: Image,
    machine: Machine,
    virtiofsd: PathBuf,
    scratch: PathBuf,
    shared: Vec<PathBuf>,
}

/// What it is booted for.
#[derive(Clone, Debug)]
pub struct Task<'a> {
    /// The program and its arguments.
    pub command: &'a [String],
    /// Whether the command gets this program's standard input.
    pub stdin: bool,
    /// Whether the kernel's messages are shown.
    pub console: bool,
    /// After this long, everything ends.
    pub limit: Duration,
}

impl TestHost {
    /// One that has the checkout, what was built in it, and the cache.
    pub fn new(installation: &Installation, image: Image, machine: Machine) -> Result<Self> {
        let cache = Cache::open()?;
        let mut host = Self {
            image,
            machine,
            virtiofsd: installation.virtiofsd.clone(),
            scratch: cache.dir().to_owned(),
            shared: Vec::new(),
        };
        host.share(Installation::workspace())?;
        host.share(&installation.programs)?;
        host.share(cache.dir())?;
        if let Some(hypervisors) = env::var_os("CAISSON_HYPERVISORS") {
            host.share(Path::new(&hypervisors))?;
        }
        Ok(host)
    }

    /// Adds a folder of this machine. What the command writes to it, this machine does not see.
    pub fn share(&mut self, folder: &Path) -> Result<()> {
        let folder = folder.canonicalize().with_context(|| format!("find {}", folder.display()))?;
        ensure!(folder.is_dir(), "{} is no folder, and cannot be shared with the test host", folder.display());
        if !self.shared.iter().any(|above| folder.starts_with(above)) {
            self.shared.push(folder);
        }
        Ok(())
    }

    /// Boots, runs the command, and ends. Standard output goes to `stdout`, standard error to this program's; the exit
    /// code is the command's.
    pub fn run(&self, task: &Task<'_>, stdout: &mut dyn Write) -> Result<u8> {
        let deadline = Instant::now() + task.limit;
        let share = Share::start(&self.virtiofsd, &self.shared)?;
        let (control, theirs) = UnixStream::pair().context("make the port")?;
        let (console, console_theirs) = UnixStream::pair().context("make the console")?;
        let scratch = scratch_disk(&self.scratch)?;
        let connections = Connections { control: theirs, console: console_theirs, scratch };
        let _machine = self.machine.start(&self.image, &share, connections)?;
        let console = if task.console { show(console) } else { Capture::of(console) };

        let mut host = Control { stream: control, deadline, pulses: false };
        let ended = host.serve(&self.job(task)?, stdout);
        ended.map_err(|error| explain(error, task.limit, &console))?.map_err(anyhow::Error::msg)
    }

    fn job(&self, task: &Task<'_>) -> Result<Job> {
        let directory = env::current_dir().context("find the current directory")?;
        let known = self.shared.iter().any(|folder| directory.starts_with(folder));
        let wanted = |name: &str| VARIABLES.iter().any(|prefix| name.starts_with(prefix));
        Ok(Job {
            command: task.command.to_vec(),
            directory: if known { directory } else { "/root".into() },
            environment: env::vars().filter(|(name, _)| wanted(name)).collect(),
            shared: self.shared.clone(),
            stdin: task.stdin,
        })
    }
}

/// This side of the port.
struct Control {
    stream: UnixStream,
    deadline: Instant,
    /// Whether it has begun to tell that its clock goes on.
    pulses: bool,
}

impl Control {
    /// Hands the job over and carries output until the verdict.
    fn serve(&mut self, job: &Job, stdout: &mut dyn Write) -> Result<Verdict> {
        loop {
            match Frame::read(&mut *self)? {
                Frame::Ready => {
                    Frame::Job(job.clone()).write(&self.stream)?;
                    if job.stdin {
                        send_stdin(self.stream.try_clone()?);
                    }
                }
                Frame::Stdout(bytes) => {
                    stdout.write_all(&bytes).and_then(|()| stdout.flush()).context("write the output")?
                }
                Frame::Stderr(bytes) => io::stderr().write_all(&bytes).context("write to standard error")?,
                Frame::Pulse => self.pulses = true,
                Frame::Exit(verdict) => return Ok(verdict),
                other @ (Frame::Job(_) | Frame::Stdin(_)) => bail!("unexpected {other:?}"),
            }
        }
    }
}

impl Read for Control {
    /// Until the deadline, or until the machine's clock stands still.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let patience = if self.pulses { STANDSTILL } else { left };
        self.stream.set_read_timeout(Some(left.min(patience)))?;
        match self.stream.read(buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && patience < left => {
                Err(io::Error::other(format!("its clock has stood still for {} s", STANDSTILL.as_secs())))
            }
            read => read,
        }
    }
}

/// Until either side ends; the thread goes with the process at the latest.
fn send_stdin(stream: UnixStream) {
    thread::spawn(move || {
        let mut chunk = vec![0; 64 * 1024];
        loop {
            let length = io::stdin().read(&mut chunk).unwrap_or(0);
            if Frame::Stdin(chunk[..length].to_vec()).write(&stream).is_err() || length == 0 {
                return;
            }
        }
    });
}

/// What went wrong with the port, for a person.
fn explain(error: anyhow::Error, limit: Duration, console: &Capture) -> anyhow::Error {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    match kind {
        Some(ErrorKind::TimedOut | ErrorKind::WouldBlock) => {
            anyhow::anyhow!("the command has not ended after {} s (--limit)", limit.as_secs())
        }
        Some(ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe) => {
            console.wait_for_end(LAST_WORDS).ok();
            anyhow::anyhow!(
                "the test host ended before the command; its console's last lines:\n{}",
                tail(&console.text())
            )
        }
        _ => error.context("talk to the test host"),
    }
}

fn tail(text: &str) -> String {
    const LINES: usize = 20;
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// An empty ext4 that nothing but the open file stands for.
fn scratch_disk(folder: &Path) -> Result<File> {
    let disk = tempfile::NamedTempFile::new_in(folder).context("make the scratch disk")?;
    disk.as_file().set_len(SCRATCH_BYTES).context("size the scratch disk")?;
    let mut mkfs = Command::new("/usr/sbin/mkfs.ext4");
    mkfs.args(["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"]).arg(disk.path());
    let output = mkfs.output().context("execute mkfs.ext4 (of e2fsprogs)")?;
    ensure!(output.status.success(), "mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr));
    Ok(disk.into_file())
}

/// Shows the console as it comes.
fn show(mut console: UnixStream) -> Arc<Capture> {
    thread::spawn(move || io::copy(&mut console, &mut io::stderr()));
    Capture::empty()
}
