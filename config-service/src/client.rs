//! Asks the host's config-service, and starts it when it does not run.
//!
//! Whoever starts it makes its socket, so that a call can wait in the socket's queue while the service comes up. A
//! lock lets one starter through at a time.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io,
    os::unix::{
        fs::DirBuilderExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use caisson_protocol::{
    config::{
        CheckRequest, CheckResponse, ListRequest, ListResponse, ResolveRequest, SandboxConfig, ShowRequest,
        ShowResponse, UseRequest, UseResponse, WatchEvent, WatchRequest,
    },
    config_ttrpc::ConfigClient,
    deadline, listen, paths,
    status::{Code, Status},
};
use nix::fcntl::{Flock, FlockArg};
use tokio::{process::Command, task::spawn_blocking, time::timeout};
use ttrpc::asynchronous::{Client, ClientStreamReceiver};

/// The service's program.
pub const PROGRAM: &str = "caisson-config-service";
/// What the service gets of the starter's environment.
const INHERITED_VARIABLES: [&str; 3] = ["PATH", "CAISSON_CONF_FILE", "RUST_LOG"];
/// The log starts anew when it is longer than this at the service's start, in bytes.
const MAX_LOG: u64 = 1 << 20;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The service cannot be started or reached.
    #[error("start {PROGRAM}: {attempt}")]
    Start {
        /// What was tried, on what.
        attempt: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The service's answer.
    #[error(transparent)]
    Refused(Status),
    /// The service did not answer.
    #[error("{PROGRAM} did not answer; its log is {log}")]
    Gone {
        /// The service's log.
        log: PathBuf,
        /// What became of the call.
        source: Status,
    },
    /// Neither start nor answer within the time that was given.
    #[error("{PROGRAM} took longer than {} ms; its log is {log}", .limit.as_millis())]
    Late {
        /// The time that was given.
        limit: Duration,
        /// The service's log.
        log: PathBuf,
    },
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Refused(status) => return status.clone(),
            Error::Start { .. } | Error::Gone { .. } => Code::UNAVAILABLE,
            Error::Late { .. } => Code::DEADLINE_EXCEEDED,
        };
        Status::of(code, &error)
    }
}

/// Resolves `request` with the host's config-service, all within `limit`. Needs a tokio runtime with all drivers.
///
/// # Errors
/// What is wrong with the configuration, or with the service.
pub async fn resolve(request: &ResolveRequest, limit: Duration) -> Result<SandboxConfig, Error> {
    ConfigService::of_this_host().resolve(request, limit).await
}

/// Where the service is, or will be.
#[derive(Clone, Debug)]
pub struct ConfigService {
    socket: PathBuf,
    lock: PathBuf,
    log: PathBuf,
    program_dirs: Vec<PathBuf>,
}

impl ConfigService {
    /// The host's.
    pub fn of_this_host() -> Self {
        let beside = env::current_exe().ok().and_then(|program| program.parent().map(Path::to_owned));
        let path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
        Self::new(&paths::config_socket(), beside.into_iter().chain(path).collect())
    }

    /// One with its socket at `socket`, its other files beside that, and its program in the first of `program_dirs`
    /// that has it.
    pub fn new(socket: &Path, program_dirs: Vec<PathBuf>) -> Self {
        let (lock, log) = (socket.with_extension("lock"), socket.with_extension("log"));
        Self { socket: socket.to_owned(), lock, log, program_dirs }
    }

    /// See [`resolve`].
    ///
    /// # Errors
    /// As there.
    pub async fn resolve(&self, request: &ResolveRequest, limit: Duration) -> Result<SandboxConfig, Error> {
        let answer = self.call(limit, |client| async move { client.resolve(deadline(limit), request).await }).await?;
        Ok(answer.config.unwrap_or_default())
    }

    /// Everything that is wrong with a configuration.
    ///
    /// # Errors
    /// What is wrong with the service; so for all that follow, besides what they say.
    pub async fn check(&self, request: &CheckRequest, limit: Duration) -> Result<CheckResponse, Error> {
        self.call(limit, |client| async move { client.check(deadline(limit), request).await }).await
    }

    /// Every value that is in force, and where it comes from.
    ///
    /// # Errors
    /// What is wrong with the configuration.
    pub async fn show(&self, request: &ShowRequest, limit: Duration) -> Result<ShowResponse, Error> {
        self.call(limit, |client| async move { client.show(deadline(limit), request).await }).await
    }

    /// The configurations to choose from.
    ///
    /// # Errors
    /// None of its own.
    pub async fn list(&self, limit: Duration) -> Result<ListResponse, Error> {
        self.call(limit, |client| async move { client.list(deadline(limit), &ListRequest::new()).await }).await
    }

    /// Puts another configuration in force.
    ///
    /// # Errors
    /// What is wrong with that configuration.
    pub async fn use_configuration(&self, request: &UseRequest, limit: Duration) -> Result<UseResponse, Error> {
        self.call(limit, |client| async move { client.r#use(deadline(limit), request).await }).await
    }

    /// What is in force, at once and after every change. Ends when the service does.
    ///
    /// # Errors
    /// None of its own.
    pub async fn watch(
        &self,
        request: &WatchRequest,
        limit: Duration,
    ) -> Result<ClientStreamReceiver<WatchEvent>, Error> {
        self.call(limit, |client| async move { client.watch(ttrpc::context::Context::default(), request).await }).await
    }

    async fn call<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        limit: Duration,
        question: impl Fn(ConfigClient) -> F,
    ) -> Result<T, Error> {
        let answer = async {
            match self.call_once(&question).await {
                // It ended just as we called, having been idle: the next one will answer.
                Err(Error::Gone { .. }) => self.call_once(&question).await,
                answer => answer,
            }
        };
        match timeout(limit, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::Late { limit, log: self.log.clone() }),
        }
    }

    async fn call_once<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        question: impl Fn(ConfigClient) -> F,
    ) -> Result<T, Error> {
        let stream = self.connect().await?;
        match question(ConfigClient::new(Client::new(stream.into()))).await.map_err(Status::from) {
            Ok(answer) => Ok(answer),
            Err(status) if status.code == Code::UNAVAILABLE => {
                Err(Error::Gone { log: self.log.clone(), source: status })
            }
            Err(status) => Err(Error::Refused(status)),
        }
    }

    async fn connect(&self) -> Result<tokio::net::UnixStream, Error> {
        if let Ok(stream) = tokio::net::UnixStream::connect(&self.socket).await {
            return Ok(stream);
        }
        let service = self.clone();
        let started = spawn_blocking(move || service.start()).await;
        let stream = started.map_err(|source| Error::start("wait for", &self.lock, source.into()))??;
        stream
            .set_nonblocking(true)
            .and_then(|()| tokio::net::UnixStream::from_std(stream))
            .map_err(|source| Error::start("use socket", &self.socket, source))
    }

    /// Starts the service unless somebody else just did, and calls it.
    fn start(&self) -> Result<UnixStream, Error> {
        let _lock = self.wait_for_turn()?;
        let connect = || UnixStream::connect(&self.socket);
        if let Ok(stream) = connect() {
            return Ok(stream);
        }
        let program = self.program()?;
        let listener =
            listen::bind(&self.socket).map_err(|source| Error::start("make socket", &self.socket, source))?;
        // Before there is anybody to answer: should the service end at once, this call ends with it.
        let stream = connect().map_err(|source| Error::start("connect to", &self.socket, source))?;
        let inherited = INHERITED_VARIABLES.into_iter().filter_map(|name| Some((name, env::var_os(name)?)));
        // The runtime reaps the child, whenever that ends.
        Command::new(&program)
            .arg("serve")
            .env_clear()
            .envs(inherited)
            .current_dir("/")
            .stdin(listen::as_stdin(listener))
            .stdout(Stdio::null())
            .stderr(self.open_log().map_or_else(|_| Stdio::null(), Stdio::from))
            .spawn()
            .map_err(|source| Error::start("execute", &program, source))?;
        Ok(stream)
    }

    /// The socket, for a service that nobody started.
    ///
    /// # Errors
    /// `AddrInUse` when a service is there already.
    pub fn listen(&self) -> io::Result<UnixListener> {
        let _lock = self.wait_for_turn().map_err(io::Error::other)?;
        if UnixStream::connect(&self.socket).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another one serves it"));
        }
        listen::bind(&self.socket)
    }

    fn wait_for_turn(&self) -> Result<Flock<File>, Error> {
        let lock = || {
            if let Some(dir) = self.lock.parent() {
                fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
            }
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&self.lock)?;
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))
        };
        lock().map_err(|source| Error::start("lock", &self.lock, source))
    }

    fn program(&self) -> Result<PathBuf, Error> {
        let found = self.program_dirs.iter().map(|dir| dir.join(PROGRAM)).find(|program| program.is_file());
        found.ok_or_else(|| {
            let dirs: Vec<_> = self.program_dirs.iter().map(|dir| dir.display().to_string()).collect();
            let attempt = format!("look for it in {}", dirs.join(", "));
            Error::Start { attempt, source: io::ErrorKind::NotFound.into() }
        })
    }

    fn open_log(&self) -> io::Result<File> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        if log.metadata()?.len() > MAX_LOG {
            log.set_len(0)?;
        }
        Ok(log)
    }
}

impl Error {
    fn start(verb: &str, path: &Path, source: io::Error) -> Self {
        Self::Start { attempt: format!("{verb} {}", path.display()), source }
    }
}
