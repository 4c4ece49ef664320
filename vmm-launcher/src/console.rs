//! The guest's serial console: a bounded log file, the last lines for errors, and why the kernel panicked.
//!
//! The guest is hostile: it may write without end. Two files of [`LOG_BYTES`] hold what it wrote last.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::OpenOptionsExt, net::UnixStream as StdUnixStream},
    },
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use caisson_protocol::vmm::{Device, device::Kind};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::{OwnedWriteHalf, pipe},
    },
    sync::watch,
    time::timeout,
};
use tracing::warn;

use crate::{
    Error, Result,
    tail::{Tail, plain},
};

/// Size of the log file, and of the older one beside it.
pub const LOG_BYTES: u64 = 1 << 20;
/// What Linux writes when it gives up, `kernel/panic.c`; `quiet` does not hide it.
const PANIC: &str = "Kernel panic - not syncing: ";
/// What Linux writes when its initrd is cut off or damaged, `init/initramfs.c`; it goes on, and panics without a first process.
const UNPACKING: &str = "Initramfs unpacking failed: ";
/// How the panic of a kernel begins that has no first process; one with a damaged initrd only says so where it is not `quiet`.
const NO_ROOT: &str = "VFS: Unable to mount root fs";
/// Longer lines are looked at in pieces.
const MAX_LINE: usize = 512;
/// As much of the panic as fits a sentence.
const MAX_WORDS: usize = 200;
/// How long the rest of the output may take to arrive after the hypervisor has ended.
const DRAIN: Duration = Duration::from_secs(1);
/// Ends the VM when typed at a terminal: Ctrl-].
const ESCAPE: u8 = 0x1d;

/// Who looks at the console besides the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Nobody.
    Nobody,
    /// Somebody at this program's standard input and output.
    Terminal,
}

/// Where the console of a VM with `devices` is logged.
pub fn log_of(devices: &[Device]) -> Option<&Path> {
    devices.iter().find_map(|device| match &device.kind {
        Some(Kind::Console(console)) => Some(Path::new(console.log.as_str())),
        _ => None,
    })
}

/// The end of what an earlier launcher has heard, for a VM that ended before it could be adopted; and why its kernel
/// panicked, if it did.
pub(crate) fn heard_before(log: Option<&Path>) -> (String, Option<String>) {
    match Heard::before(log) {
        Ok((_, heard)) => {
            let tail = heard.tail.lock().expect("nobody else has it").text();
            (tail, heard.panic.into_inner().expect("nobody else has it"))
        }
        Err(_) => (String::new(), None),
    }
}

/// One guest's console.
#[derive(Clone, Debug)]
pub struct Console {
    heard: Arc<Heard>,
    drained: watch::Receiver<bool>,
    escaped: watch::Receiver<bool>,
}

#[derive(Debug, Default)]
struct Heard {
    tail: Mutex<Tail>,
    bytes: AtomicU64,
    panic: Mutex<Option<String>>,
    broken_initrd: Mutex<Option<String>>,
}

impl Console {
    /// Makes a console and the end of it that belongs to the hypervisor, a connected stream socket.
    ///
    /// # Errors
    /// When the log file cannot be made.
    pub fn open(log: Option<&Path>, audience: Audience) -> Result<(Self, OwnedFd)> {
        let (near, far) = pair().map_err(Error::host("make the console's socket pair"))?;
        Ok((Self::over(near, log, audience)?, far))
    }

    /// A console on a connection that the hypervisor has taken.
    ///
    /// # Errors
    /// When the log file cannot be made.
    pub fn over(connection: UnixStream, log: Option<&Path>, audience: Audience) -> Result<Self> {
        let log = log.map(Log::create).transpose()?;
        let (output, input) = connection.into_split();
        Ok(Self::listen(output, Some(Input::Socket(input)), log, Heard::default(), audience))
    }

    /// The console of an adopted VM, on a new connection: its log goes on, and what is in there was heard.
    ///
    /// # Errors
    /// When the log file cannot be read and written.
    pub fn adopt(connection: UnixStream, log: Option<&Path>) -> Result<Self> {
        let (output, input) = connection.into_split();
        let (log, heard) = Heard::before(log)?;
        Ok(Self::listen(output, Some(Input::Socket(input)), log, heard, Audience::Nobody))
    }

    /// A console that the hypervisor writes to a pipe, and what it reads, which is another one if there is an audience.
    ///
    /// # Errors
    /// When the log file or the pipe cannot be made.
    pub fn over_pipe(output: pipe::Receiver, log: Option<&Path>, audience: Audience) -> Result<(Self, Stdio)> {
        let log = log.map(Log::create).transpose()?;
        let (input, stdin) = match audience {
            Audience::Nobody => (None, Stdio::null()),
            Audience::Terminal => {
                let (stdin, input) = input_pipe().map_err(Error::host("make a pipe for the guest's input"))?;
                (Some(Input::Pipe(input)), stdin)
            }
        };
        Ok((Self::listen(output, input, log, Heard::default(), audience), stdin))
    }

    /// [`Self::adopt`] for one on a pipe.
    ///
    /// # Errors
    /// When the log file cannot be read and written.
    pub fn adopt_pipe(output: pipe::Receiver, log: Option<&Path>) -> Result<Self> {
        let (log, heard) = Heard::before(log)?;
        Ok(Self::listen(output, None, log, heard, Audience::Nobody))
    }

    fn listen(
        output: impl AsyncRead + Unpin + Send + 'static,
        input: Option<Input>,
        log: Option<Log>,
        heard: Heard,
        audience: Audience,
    ) -> Self {
        let heard = Arc::new(heard);
        let (tell_drained, drained) = watch::channel(false);
        let (tell_escaped, escaped) = watch::channel(false);
        let listener = heard.clone();
        tokio::spawn(async move {
            listener.follow(output, log, audience).await;
            tell_drained.send_replace(true);
        });
        // Without a reader at the other end the guest's input stays closed.
        if let Some(input) = input {
            tokio::spawn(async move {
                match audience {
                    Audience::Terminal => forward_input(tokio::io::stdin(), input, tell_escaped).await,
                    Audience::Nobody => hold(input, tell_escaped).await,
                }
            });
        }
        Self { heard, drained, escaped }
    }

    /// The last lines, at most 4 KiB.
    pub fn tail(&self) -> String {
        self.heard.tail.lock().expect("no listener panics").text()
    }

    /// How many bytes the guest has written.
    pub fn bytes(&self) -> u64 {
        self.heard.bytes.load(Ordering::Relaxed)
    }

    /// Why the guest's kernel panicked, in its own words, if it did; and what is wrong with its initrd, if it has said so.
    pub fn panic(&self) -> Option<String> {
        let panic = self.heard.panic.lock().expect("no listener panics").clone()?;
        let initrd = self.heard.broken_initrd.lock().expect("no listener panics").clone();
        Some(match initrd {
            Some(why) => format!("{}; its initrd is cut off or damaged: {why}", panic.trim_end_matches('.')),
            None if panic.starts_with(NO_ROOT) => {
                format!("{panic}; its initrd is damaged or has no first process, or its root disk is missing")
            }
            None => panic,
        })
    }

    /// Answers when everything was heard that an ended hypervisor left behind.
    pub async fn drained(&self) {
        let mut drained = self.drained.clone();
        if timeout(DRAIN, drained.wait_for(|drained| *drained)).await.is_err() {
            warn!("the guest's console is still open although its hypervisor has ended");
        }
    }

    /// Answers when somebody typed Ctrl-] at the terminal.
    pub async fn escaped(&self) {
        let mut escaped = self.escaped.clone();
        if escaped.wait_for(|escaped| *escaped).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Heard {
    /// What an earlier launcher has heard, as far as the log has it, and the log to go on with.
    fn before(path: Option<&Path>) -> Result<(Option<Log>, Self)> {
        let heard = Self::default();
        let Some(path) = path else { return Ok((None, heard)) };
        let (log, text) =
            Log::reopen(path).map_err(|source| Error::File { what: "console log", path: path.into(), source })?;
        heard.bytes.store(text.len() as u64, Ordering::Relaxed);
        heard.tail.lock().expect("nobody else has it").push(&text);
        heard.look_for_panic(&mut Vec::new(), &text);
        Ok((Some(log), heard))
    }

    async fn follow(&self, mut output: impl AsyncRead + Unpin, mut log: Option<Log>, audience: Audience) {
        let mut buffer = [0; 4096];
        let mut line = Vec::new();
        while let Ok(count @ 1..) = output.read(&mut buffer).await {
            let chunk = &buffer[..count];
            self.bytes.fetch_add(count as u64, Ordering::Relaxed);
            self.tail.lock().expect("no reader panics").push(chunk);
            self.look_for_panic(&mut line, chunk);
            if let Some(Err(error)) = log.as_mut().map(|log| log.write(chunk)) {
                warn!(%error, "the console's log cannot be written and ends here");
                log = None;
            }
            if audience == Audience::Terminal {
                let mut stdout = tokio::io::stdout();
                let _ = stdout.write_all(chunk).await;
                let _ = stdout.flush().await;
            }
        }
    }

    /// `line` carries the beginning of the last line, because chunks end anywhere.
    fn look_for_panic(&self, line: &mut Vec<u8>, chunk: &[u8]) {
        for piece in chunk.split_inclusive(|byte| *byte == b'\n') {
            line.extend_from_slice(piece);
            for (sign, found) in [(PANIC, &self.panic), (UNPACKING, &self.broken_initrd)] {
                if let Some((_, words)) = String::from_utf8_lossy(line).split_once(sign) {
                    *found.lock().expect("no reader panics") =
                        Some(plain(words).trim().chars().take(MAX_WORDS).collect());
                }
            }
            if line.ends_with(b"\n") || line.len() > MAX_LINE {
                line.clear();
            }
        }
    }
}

fn pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (near, far) = StdUnixStream::pair()?;
    near.set_nonblocking(true)?;
    Ok((UnixStream::from_std(near)?, far.into()))
}

fn input_pipe() -> io::Result<(Stdio, pipe::Sender)> {
    let (reader, writer) = io::pipe()?;
    Ok((reader.into(), pipe::Sender::from_owned_fd(writer.into())?))
}

/// Where the guest's input goes.
enum Input {
    Socket(OwnedWriteHalf),
    Pipe(pipe::Sender),
}

impl Input {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Socket(socket) => socket.write_all(bytes).await,
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
        }
    }

    /// Answers when the hypervisor has closed its end.
    async fn closed(&self) {
        let _ = match self {
            Self::Socket(socket) => socket.as_ref().ready(Interest::ERROR).await,
            Self::Pipe(pipe) => pipe.ready(Interest::ERROR).await,
        };
    }
}

async fn forward_input(mut from: impl AsyncRead + Unpin, mut input: Input, escaped: watch::Sender<bool>) {
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if buffer[..count].contains(&ESCAPE) {
            escaped.send_replace(true);
        }
        if input.write(&buffer[..count]).await.is_err() {
            return;
        }
    }
    hold(input, escaped).await;
}

/// Keeps the console's input open for as long as the hypervisor keeps it: it would take a closed one for the end of both.
async fn hold(input: Input, _escaped: watch::Sender<bool>) {
    input.closed().await;
}

/// The log: `path` and, once that is full, what it held before in `<path>.1`.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    written: u64,
}

impl Log {
    fn create(path: &Path) -> Result<Self> {
        let file =
            Self::create_file(path).map_err(|source| Error::File { what: "console log", path: path.into(), source })?;
        Ok(Self { path: path.to_owned(), file, written: 0 })
    }

    /// The log of an earlier launcher, and all that is in it.
    fn reopen(path: &Path) -> io::Result<(Self, Vec<u8>)> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut text = Vec::new();
        (&mut file).take(2 * LOG_BYTES).read_to_end(&mut text)?;
        let written = file.metadata()?.len();
        Ok((Self { path: path.to_owned(), file, written }, text))
    }

    fn create_file(path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.written + bytes.len() as u64 > LOG_BYTES {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            fs::rename(&self.path, older)?;
            self.file = Self::create_file(&self.path)?;
            self.written = 0;
        }
        self.written += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn hear(log: Option<&Path>, chunks: &[&[u8]]) -> Console {
        let (console, far) = Console::open(log, Audience::Nobody).unwrap();
        let chunks: Vec<Vec<u8>> = chunks.iter().map(|chunk| chunk.to_vec()).collect();
        std::thread::spawn(move || {
            let mut far = StdUnixStream::from(far);
            chunks.iter().for_each(|chunk| far.write_all(chunk).unwrap());
        });
        console.drained().await;
        console
    }

    #[tokio::test]
    async fn what_the_guest_wrote_is_in_the_log_and_the_tail() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        let console = hear(Some(&log), &[b"hello ", b"world\r\n"]).await;
        assert_eq!(console.tail(), "hello world");
        assert_eq!(console.bytes(), 13);
        assert_eq!(fs::read(log).unwrap(), b"hello world\r\n");
    }

    #[tokio::test]
    async fn a_guest_that_never_stops_writing_gets_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        let flood = vec![b'x'; 3 << 20];
        hear(Some(&log), &[&flood, b"end"]).await;
        // The older file first: the end may have begun a new one.
        let mut kept = fs::read(dir.path().join("console.log.1")).unwrap();
        kept.extend(fs::read(&log).unwrap());
        assert!(kept.ends_with(b"xend"));
        let total: u64 = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(total <= 2 * LOG_BYTES, "{total}");
    }

    #[tokio::test]
    async fn an_adopted_console_goes_on_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        hear(Some(&log), &[b"before\n"]).await;
        let (near, far) = pair().unwrap();
        let console = Console::adopt(near, Some(&log)).unwrap();
        StdUnixStream::from(far).write_all(b"after\n").unwrap();
        console.drained().await;
        assert_eq!(fs::read_to_string(&log).unwrap(), "before\nafter\n");
        assert_eq!((console.tail().as_str(), console.bytes()), ("before\nafter", 13));
    }

    #[tokio::test]
    async fn a_panic_is_recognised_although_it_comes_in_pieces() {
        let console = hear(None, &[b"[ 0.5] Kernel pan", b"ic - not syncing: no init\n"]).await;
        assert_eq!(console.panic().as_deref(), Some("no init"));
    }

    #[tokio::test]
    async fn a_panic_for_want_of_an_initrd_is_told_with_what_is_wrong_with_it() {
        let words: &[u8] = b"Initramfs unpacking failed: ZSTD-compressed data is corrupt\r\n";
        let console = hear(None, &[words, b"Kernel panic - not syncing: No working init found.\r\n"]).await;
        let expected = "No working init found; its initrd is cut off or damaged: ZSTD-compressed data is corrupt";
        assert_eq!(console.panic().as_deref(), Some(expected));
    }

    #[tokio::test]
    async fn a_panic_for_want_of_a_root_is_told_with_what_may_be_wrong() {
        let console =
            hear(None, &[b"Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n"]).await;
        let words = console.panic().unwrap();
        assert!(
            words.ends_with("(0,0); its initrd is damaged or has no first process, or its root disk is missing"),
            "{words}"
        );
    }

    #[tokio::test]
    async fn ordinary_output_is_no_panic() {
        let console = hear(None, &[b"panic is not what happens here\n"]).await;
        assert_eq!(console.panic(), None);
    }

    #[tokio::test]
    async fn what_is_typed_arrives_until_the_hypervisor_has_ended() {
        let (stdin, input) = io::pipe().unwrap();
        let mut stdin = pipe::Receiver::from_owned_fd(stdin.into()).unwrap();
        let input = Input::Pipe(pipe::Sender::from_owned_fd(input.into()).unwrap());
        let (mut terminal, from) = tokio::io::duplex(64);
        let forwarding = tokio::spawn(forward_input(from, input, watch::Sender::new(false)));
        let mut heard = [0; 8];
        terminal.write_all(b"morning\n").await.unwrap();
        stdin.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"morning\n");
        terminal.write_all(b"evening\n").await.unwrap();
        stdin.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"evening\n");
        // The terminal's end is none of the guest's input.
        drop(terminal);
        assert_eq!(stdin.try_read(&mut heard).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(stdin);
        forwarding.await.unwrap();
    }

    #[test]
    fn a_log_in_a_missing_directory_is_named() {
        let error = Log::create(Path::new("/nonexistent/console.log")).unwrap_err();
        assert_eq!(error.to_string(), "open the console log /nonexistent/console.log");
    }
}
