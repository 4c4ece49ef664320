//! A child process of the launcher: a hypervisor or a device backend. Its end is an event, its last words are kept, and
//! it outlives the launcher only where it is asked to: then another launcher adopts it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::ExitStatusExt},
    },
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use caisson_protocol::processes::ProcessId;
use command_fds::CommandFdExt;
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::unix::pipe,
    process::{Child, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    Error, Result,
    outlive::{Known, Lifetime},
    sys,
    tail::Tail,
};

/// A running child, or one of a launcher that was killed; killed when dropped.
#[derive(Debug)]
pub struct Process {
    known: Known,
    kill: mpsc::Sender<()>,
    ended: watch::Receiver<Option<Ended>>,
}

/// How a child ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// What the kernel says; only a parent is told for sure.
    pub status: Option<ExitStatus>,
    /// The end of what the child wrote to its standard error.
    pub stderr: String,
}

impl Ended {
    /// Whether it is known to have ended as it should.
    pub fn well(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// How the process has ended, if it has, without having been watched.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub(crate) fn before(known: &Known) -> io::Result<Option<Self>> {
        let Some(process) = known.id().open()? else {
            return Ok(Some(Self { status: None, stderr: String::new() }));
        };
        if poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? == 0 {
            return Ok(None);
        }
        Ok(Some(Self { status: status_of_ended(known.id()), stderr: String::new() }))
    }

    /// In words for people that follow a name: "exited with status 1: its last words".
    pub fn how(&self) -> String {
        let how = match self.status.map(|status| (status.code(), status.signal())) {
            Some((Some(code), _)) => format!("exited with status {code}"),
            Some((None, Some(signal))) => format!("was killed by {}", signal_name(signal)),
            Some((None, None)) => "ended".to_owned(),
            None => "ended, and how is known only to its parent".to_owned(),
        };
        self.with_last_words(how)
    }

    /// `words` about it, and after them its own last words, if it had any.
    pub fn with_last_words(&self, words: String) -> String {
        if self.stderr.is_empty() { words } else { format!("{words}: {}", self.stderr) }
    }

    /// [`Self::how`] of the process `pid` that executed `program`.
    pub(crate) fn words(&self, program: &Path, pid: u32) -> String {
        format!("{} (pid {pid}) {}", program.display(), self.how())
    }
}

/// A child's standard input and output; its standard error is for its last words.
#[derive(Debug)]
pub struct Streams {
    /// What it reads.
    pub stdin: Stdio,
    /// Where it writes.
    pub stdout: Stdio,
}

impl Process {
    /// Starts `program` with `arguments`; `descriptors` keep their numbers in the child. Must be called on the thread that
    /// lives as long as the launcher.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn start(program: &Path, arguments: &[String], descriptors: Vec<OwnedFd>) -> Result<Self> {
        Self::start_with(program, arguments, descriptors, Streams::none(), &Lifetime::of_launcher())
    }

    /// [`Self::start`] for a program that uses its standard streams or may outlive the launcher.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn start_with(
        program: &Path,
        arguments: &[String],
        descriptors: Vec<OwnedFd>,
        streams: Streams,
        lifetime: &Lifetime,
    ) -> Result<Self> {
        let (words, stderr) = lasting_pipe().map_err(Error::host("make a pipe"))?;
        let mut command = Command::new(program);
        command.args(arguments).preserved_fds(descriptors).kill_on_drop(true);
        command.stdin(streams.stdin).stdout(streams.stdout).stderr(Stdio::from(stderr));
        // Last words have little room, and a trace of calls leaves none for what went wrong.
        command.env_remove("RUST_BACKTRACE").env_remove("RUST_LIB_BACKTRACE");
        match lifetime.list() {
            Some(list) => {
                let list = list.try_clone().map_err(Error::host("open the list of processes once more"))?;
                sys::join_list(&mut command, list.into());
            }
            None => sys::die_with_parent(&mut command),
        }
        let mut child = command.spawn().map_err(Error::host(format!("execute {}", program.display())))?;
        // Before anybody waits for it, after which its number may name another.
        let known = Known::new(program, child.id().unwrap_or_default())?;
        let (process, mut killed, end) = Self::watched(known, Some(words));
        tokio::spawn(async move {
            let status = wait(&mut child, &mut killed).await;
            end.tell(status).await;
        });
        Ok(process)
    }

    /// Goes on with a process that another launcher has started to outlive it.
    ///
    /// # Errors
    /// When it is gone; when it cannot be watched.
    pub fn adopt(known: &Known) -> Result<Self> {
        let (program, id) = (&known.program, known.id());
        let watch = format!("watch {} (pid {})", program.display(), id.pid);
        let handle = id.open().map_err(Error::host(&watch))?;
        let handle = handle.ok_or_else(|| {
            Error::Hypervisor(format!("{} (pid {}) has ended while no launcher watched it", program.display(), id.pid))
        })?;
        // An ended one has none left.
        let words = reopen(id.pid, 2).ok();
        let handle = sys::watch(handle).map_err(Error::host(watch))?;
        let (process, mut killed, end) = Self::watched(known.clone(), words);
        tokio::spawn(async move {
            tokio::select! {
                _ = handle.readable() => {}
                _ = killed.recv() => {
                    // It fails when the process has ended, which is all the same.
                    let _ = pidfd_send_signal(handle.as_fd(), Signal::KILL);
                    let _ = handle.readable().await;
                }
            }
            end.tell(status_of_ended(id)).await;
        });
        Ok(process)
    }

    fn watched(known: Known, words: Option<pipe::Receiver>) -> (Self, mpsc::Receiver<()>, End) {
        let stderr = Arc::new(Mutex::new(Tail::default()));
        let reader = words.map(|pipe| tokio::spawn(keep_tail(pipe, stderr.clone())));
        let (kill, killed) = mpsc::channel(1);
        let (tell, ended) = watch::channel(None);
        (Self { known, kill, ended }, killed, End { stderr, reader, tell })
    }

    /// What another launcher needs to adopt it.
    pub fn known(&self) -> Known {
        self.known.clone()
    }

    /// The same child, called by the name of the program that it executes next.
    pub fn becomes(mut self, program: &Path) -> Self {
        self.known.program = program.to_owned();
        self
    }

    /// What it executed.
    pub fn program(&self) -> &Path {
        &self.known.program
    }

    /// On the host.
    pub fn pid(&self) -> u32 {
        self.known.id().pid
    }

    /// Ends the child at once; [`Self::ended`] tells when it has.
    pub fn kill(&self) {
        // Full: it is being killed already. Closed: it has ended.
        let _ = self.kill.try_send(());
    }

    /// Answers when the child has ended and was reaped.
    pub fn ended(&self) -> impl Future<Output = Ended> + Send + use<> {
        let mut ended = self.ended.clone();
        async move {
            match ended.wait_for(Option::is_some).await {
                Ok(ended) => ended.clone().expect("waited for"),
                Err(_) => unreachable!("the task that reaps a child always tells"),
            }
        }
    }

    /// [`Self::ended`] for one that hangs once a helper of it has failed: it is ended then, and the helper's words explain it.
    pub async fn ended_with(&self, helper_failed: impl Future<Output = String>) -> (Ended, Option<String>) {
        let words = tokio::select! {
            ended = self.ended() => return (ended, None),
            words = helper_failed => words,
        };
        // A helper ends when its hypervisor does, and may be heard of first.
        if let Ok(ended) = timeout(HELPER_AFTER_HYPERVISOR, self.ended()).await {
            return (ended, None);
        }
        self.kill();
        (self.ended().await, Some(words))
    }

    /// `refusal` of this hypervisor, and how it has ended, as `describe` has it, if that is why.
    pub async fn last_words(&self, refusal: Error, describe: impl FnOnce(&Ended) -> String) -> Error {
        let Error::Hypervisor(why) = refusal else { return refusal };
        match timeout(END_AFTER_REFUSAL, self.ended()).await {
            Ok(ended) if !why.contains(&ended.how()) => Error::Hypervisor(format!("{why}: {}", describe(&ended))),
            _ => Error::Hypervisor(why),
        }
    }

    /// `ended` in words for people: "/usr/bin/qemu-system-x86_64 exited with status 1: its last words".
    pub fn describe(&self, ended: &Ended) -> String {
        ended.words(&self.known.program, self.pid())
    }
}

impl Streams {
    /// For a program that reads and writes nothing.
    pub fn none() -> Self {
        Self { stdin: Stdio::null(), stdout: Stdio::null() }
    }
}

/// What is to be told at a process's end.
struct End {
    stderr: Arc<Mutex<Tail>>,
    reader: Option<JoinHandle<()>>,
    tell: watch::Sender<Option<Ended>>,
}

impl End {
    async fn tell(self, status: Option<ExitStatus>) {
        if let Some(reader) = self.reader {
            // The pipe ends with its last writer, and a child's own children do not matter here.
            let _ = timeout(LAST_WORDS, reader).await;
        }
        let stderr = self.stderr.lock().expect("no reader panics").text();
        self.tell.send_replace(Some(Ended { status, stderr }));
    }
}

/// A pipe whose writer can also read it: without a launcher at the other end it is no broken one, and what is written
/// meanwhile stays in it for the next.
pub fn lasting_pipe() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
    let writer = OpenOptions::new().read(true).write(true).open(path)?;
    Ok((pipe::Receiver::from_owned_fd(reader.into())?, writer.into()))
}

/// The reader of the [`lasting_pipe`] that process `pid` has as descriptor `number`.
///
/// # Errors
/// When the process is gone, or its descriptor is no pipe.
pub fn reopen(pid: u32, number: i32) -> io::Result<pipe::Receiver> {
    let path = format!("/proc/{pid}/fd/{number}");
    // Before anything is opened: to open something else could do more than to read.
    if !fs::read_link(&path)?.to_string_lossy().starts_with("pipe:") {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{path} is no pipe")));
    }
    let file = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    pipe::Receiver::from_file(file)
}

/// `proc_pid_stat(5)` has it in its last field until the parent asks, and then the process is gone.
fn status_of_ended(id: ProcessId) -> Option<ExitStatus> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", id.pid)).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let is_it = fields.first() == Some(&"Z") && fields.get(19)?.parse() == Ok(id.start_ticks);
    is_it.then(|| fields.get(49)?.parse().ok().map(ExitStatus::from_raw)).flatten()
}

/// How long the last words of an ended child may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How much later than it refuses something a hypervisor may end because of that.
const END_AFTER_REFUSAL: Duration = Duration::from_millis(100);
/// How much later than its helpers a hypervisor may be heard to have ended.
const HELPER_AFTER_HYPERVISOR: Duration = Duration::from_secs(1);

fn signal_name(number: i32) -> String {
    nix::sys::signal::Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |signal| signal.to_string())
}

/// None when the kernel does not tell.
async fn wait(child: &mut Child, killed: &mut mpsc::Receiver<()>) -> Option<ExitStatus> {
    tokio::select! {
        status = child.wait() => return status.ok(),
        // A message, or the `Process` was dropped.
        _ = killed.recv() => {}
    }
    // It fails when the child has ended, which is all the same.
    let _ = child.start_kill();
    child.wait().await.ok()
}

async fn keep_tail(mut pipe: impl AsyncRead + Unpin, tail: Arc<Mutex<Tail>>) {
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        tail.lock().expect("no reader panics").push(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use caisson_protocol::{processes::ProcessList, vmm::CreateRequest};

    use super::*;

    fn shell(script: &str) -> Process {
        Process::start(Path::new("/bin/sh"), &["-c".into(), script.into()], Vec::new()).unwrap()
    }

    #[tokio::test]
    async fn last_words_and_status_are_told() {
        let process = shell("echo no disk >&2; exit 3");
        let ended = process.ended().await;
        assert_eq!(process.describe(&ended), format!("/bin/sh (pid {}) exited with status 3: no disk", process.pid()));
    }

    #[tokio::test]
    async fn a_kill_is_told_by_its_signal() {
        let process = shell("exec sleep 1000");
        process.kill();
        let ended = process.ended().await;
        assert!(process.describe(&ended).ends_with("was killed by SIGKILL"));
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed_and_reaped() {
        let process = shell("exec sleep 1000");
        let mut ended = process.ended.clone();
        drop(process);
        assert_eq!(ended.wait_for(Option::is_some).await.unwrap().as_ref().unwrap().status.unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = Process::start(Path::new("/nonexistent/qemu"), &[], Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "execute /nonexistent/qemu");
    }

    /// A shell as an earlier launcher would have started it, and what that launcher remembers.
    fn outliving(script: &str, dir: &Path) -> (Process, Known) {
        let request = CreateRequest { state_dir: dir.to_str().unwrap().into(), ..Default::default() };
        let arguments = ["-c".into(), script.into()];
        drop(ProcessList::in_dir(dir).create().unwrap());
        let lifetime = Lifetime::of(&request).unwrap();
        let process =
            Process::start_with(Path::new("/bin/sh"), &arguments, Vec::new(), Streams::none(), &lifetime).unwrap();
        let known = process.known();
        (process, known)
    }

    #[tokio::test]
    async fn an_adopted_process_can_be_killed_and_its_end_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (process, known) = outliving("exec sleep 1000", dir.path());
        let adopted = Process::adopt(&known).unwrap();
        adopted.kill();
        // The first to hear of it takes the status away; that is this test's runtime.
        assert!(!adopted.ended().await.well());
        assert_eq!(process.ended().await.status.unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn a_process_that_may_outlive_the_launcher_is_on_the_list_before_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let (process, known) = outliving("exec sleep 1000", dir.path());
        let list = ProcessList::in_dir(dir.path());
        assert_eq!(list.read().unwrap(), [known.id()]);
        list.end_all(Duration::from_secs(20)).unwrap();
        assert_eq!(process.ended().await.status.unwrap().signal(), Some(9));
    }

    #[tokio::test]
    async fn a_process_that_has_ended_is_known_as_what_it_was() {
        let process = shell("exit 0");
        let known = process.known();
        process.ended().await;
        assert_eq!(process.known(), known);
        assert!(Process::adopt(&process.known()).is_err());
    }

    #[tokio::test]
    async fn a_refusal_is_told_with_how_the_hypervisor_has_ended() {
        let process = shell("echo out of memory >&2; exit 3");
        process.ended().await;
        let told = |refusal| process.last_words(refusal, |ended| process.describe(ended));
        let hung_up = told(Error::Hypervisor("Fake hung up".into())).await.to_string();
        assert_eq!(
            hung_up,
            format!("Fake hung up: /bin/sh (pid {}) exited with status 3: out of memory", process.pid())
        );
        assert_eq!(told(Error::Hypervisor(hung_up.clone())).await.to_string(), hung_up);
        assert_eq!(told(Error::Invalid("no such disk".into())).await.to_string(), "no such disk");
    }

    #[tokio::test]
    async fn a_refusal_of_a_hypervisor_that_goes_on_is_told_as_it_is() {
        let process = shell("exec sleep 1000");
        let refusal = process.last_words(Error::Hypervisor("no".into()), |_| unreachable!("it goes on")).await;
        assert_eq!(refusal.to_string(), "no");
    }

    #[tokio::test]
    async fn a_process_that_is_gone_is_not_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let (process, known) = outliving("exit 0", dir.path());
        process.ended().await;
        let error = Process::adopt(&known).unwrap_err().to_string();
        assert!(error.ends_with("has ended while no launcher watched it"), "{error}");
    }

    #[tokio::test]
    async fn a_lasting_pipe_keeps_what_is_written_while_nobody_reads() {
        let (reader, writer) = lasting_pipe().unwrap();
        drop(reader);
        let mut writer = File::from(writer);
        std::io::Write::write_all(&mut writer, b"words").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&writer);
        let mut reader = reopen(std::process::id(), number).unwrap();
        drop(writer);
        let mut heard = String::new();
        reader.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "words");
    }
}
