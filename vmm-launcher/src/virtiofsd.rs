//! virtiofsd: one process per shared directory, the vhost-user backend of a virtio-fs device.
//!
//! It inherits its listening socket, and the hypervisor's connection to it waits there before it runs: nobody waits for a
//! socket to appear.

use std::{
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
};

use caisson_protocol::vmm::Fs;

use crate::{
    Error, Result,
    outlive::{Known, Lifetime},
    process::{Process, Streams},
    request::readable,
};

/// The values of `Fs.cache`.
pub const CACHE_MODES: [&str; 3] = ["auto", "always", "never"];

/// A running virtiofsd; killed when dropped.
#[derive(Debug)]
pub struct Virtiofsd {
    tag: String,
    process: Process,
}

impl Virtiofsd {
    /// Starts it, and answers with the hypervisor's connection. Its socket's name in `run_dir` is gone when this returns.
    ///
    /// # Errors
    /// When the program cannot be executed, or `run_dir` is too long for a socket's path.
    pub fn start(fs: &Fs, run_dir: &Path, lifetime: &Lifetime) -> Result<(Self, OwnedFd)> {
        readable("virtio-fs daemon", &fs.daemon_path)?;
        let (listener, connection) = connected_listener(&run_dir.join("virtiofsd.sock"))?;
        Ok((Self::serve(fs, listener.into(), lifetime)?, connection))
    }

    /// Starts it for a hypervisor that connects to `socket` by itself; whoever calls removes the socket.
    ///
    /// # Errors
    /// When the program cannot be executed, or `socket` cannot be made.
    pub fn listen(fs: &Fs, socket: &Path, lifetime: &Lifetime) -> Result<Self> {
        readable("virtio-fs daemon", &fs.daemon_path)?;
        let listener = caisson_protocol::listen::bind(socket)
            .map_err(Error::host(format!("make the socket {}", socket.display())))?;
        Self::serve(fs, listener.into(), lifetime)
    }

    fn serve(fs: &Fs, listener: OwnedFd, lifetime: &Lifetime) -> Result<Self> {
        let cache = if fs.cache.is_empty() { CACHE_MODES[0] } else { &fs.cache };
        let mut arguments = vec![
            format!("--fd={}", listener.as_raw_fd()),
            format!("--shared-dir={}", fs.shared_dir),
            format!("--cache={cache}"),
            "--log-level=error".into(),
        ];
        arguments.extend(fs.extra_args.iter().cloned());
        let program = Path::new(&fs.daemon_path);
        let process = Process::start_with(program, &arguments, vec![listener], Streams::none(), lifetime)?;
        Ok(Self { tag: fs.tag.clone(), process })
    }

    /// The one that serves the share `tag`, of a launcher that was killed.
    ///
    /// # Errors
    /// When it has ended.
    pub fn adopt(tag: &str, known: &Known) -> Result<Self> {
        Ok(Self { tag: tag.to_owned(), process: Process::adopt(known)? })
    }

    /// The share's name, and what another launcher needs to adopt the process.
    pub fn known(&self) -> (String, Known) {
        (self.tag.clone(), self.process.known())
    }

    /// Answers when it has failed: what ended, and its last words. It also ends when the hypervisor hangs up; that is no
    /// failure, and never answered.
    pub fn failed(&self) -> impl Future<Output = String> + Send + use<> {
        let ((tag, known), ended) = (self.known(), self.process.ended());
        async move {
            let ended = ended.await;
            if ended.well() {
                std::future::pending::<()>().await;
            }
            format!("the file server of share \"{tag}\" ended: {}", ended.words(&known.program, known.id().pid))
        }
    }

    /// Ends it and waits until it has.
    pub async fn end(&self) {
        self.process.kill();
        self.process.ended().await;
    }
}

/// The file servers of one VM; killed when dropped.
#[derive(Debug, Default)]
pub struct FileServers(Vec<Virtiofsd>);

/// [`FileServers`] for another launcher, by their shares.
pub type KnownFileServers = Vec<(String, Known)>;

impl FileServers {
    /// Those of a launcher that was killed.
    ///
    /// # Errors
    /// When one has ended.
    pub fn adopt(known: &KnownFileServers) -> Result<Self> {
        known.iter().map(|(tag, known)| Virtiofsd::adopt(tag, known)).collect::<Result<_>>().map(Self)
    }

    /// One more.
    pub fn add(&mut self, file_server: Virtiofsd) {
        self.0.push(file_server);
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What another launcher needs to adopt them, if they outlive this one.
    pub fn known(&self, lifetime: &Lifetime) -> KnownFileServers {
        match lifetime.is_longer() {
            true => self.0.iter().map(Virtiofsd::known).collect(),
            false => Vec::new(),
        }
    }

    /// Answers with the words of the first that fails; never when there is none.
    pub async fn failed(&self) -> String {
        first(self.0.iter().map(Virtiofsd::failed).collect()).await
    }

    /// Ends them and waits until they have.
    pub async fn end(&self) {
        for file_server in &self.0 {
            file_server.end().await;
        }
    }
}

/// Answers with the first of `failures`; never when there is none.
pub async fn first<T: Future>(failures: Vec<T>) -> T::Output {
    let mut failures: Vec<_> = failures.into_iter().map(Box::pin).collect();
    std::future::poll_fn(|context| {
        failures
            .iter_mut()
            .map(|failure| failure.as_mut().poll(context))
            .find(std::task::Poll::is_ready)
            .unwrap_or(std::task::Poll::Pending)
    })
    .await
}

/// A listening socket without a name, and a connection that waits in it.
///
/// # Errors
/// When `path`, which exists only for a moment, is too long or cannot be made.
pub fn connected_listener(path: &Path) -> Result<(UnixListener, OwnedFd)> {
    let made = named_listener(path)?;
    std::fs::remove_file(path).map_err(failed(path))?;
    Ok(made)
}

/// A listening socket that keeps its name, for those who come later, and a connection that waits in it.
///
/// # Errors
/// When `path` is too long or cannot be made.
pub fn named_listener(path: &Path) -> Result<(UnixListener, OwnedFd)> {
    let make = || {
        let listener = caisson_protocol::listen::bind(path)?;
        let connection = UnixStream::connect(path)?;
        Ok((listener, OwnedFd::from(connection)))
    };
    make().map_err(failed(path))
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    Error::host(format!("make the socket {}", path.display()))
}
