//! What can go wrong in a shim, and the status code that containerd sees for it.

use std::{io, path::PathBuf};

use caisson_protocol::{
    id::{Id, InvalidId},
    status::{Code, Status},
};

/// See [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure in words for the person who runs containerd.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is not one that containerd writes.
    #[error("{0}")]
    Usage(String),
    /// A name breaks containerd's own rule.
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
    /// The bundle has no usable `config.json`.
    #[error("read bundle config {path}")]
    ReadBundle {
        /// `<bundle>/config.json`
        path: PathBuf,
        /// From the file system or the parser.
        source: oci_spec::OciSpecError,
    },
    /// A request asks for what this runtime does not do.
    #[error("{0}")]
    Unsupported(String),
    /// A container or exec with this name exists.
    #[error("{what} {id} already exists")]
    Exists {
        /// "container" or "exec".
        what: &'static str,
        /// Its name.
        id: Id,
    },
    /// No such container or exec.
    #[error("no {what} {id}")]
    NotFound {
        /// "container" or "exec".
        what: &'static str,
        /// Its name.
        id: Id,
    },
    /// The process has ended; in runc's words, which containerd's clients know.
    #[error("process already finished")]
    Finished,
    /// The verb does not fit the state.
    #[error("cannot {verb} a {what} that is {state}")]
    WrongState {
        /// What was asked.
        verb: &'static str,
        /// "process" or "sandbox".
        what: &'static str,
        /// As a word.
        state: &'static str,
    },
    /// A step on the host failed.
    #[error("{action}")]
    Host {
        /// "make the sandbox directory /run/…".
        action: String,
        /// The kernel's word.
        source: io::Error,
    },
    /// The sandbox was told to stop while it started.
    #[error("the sandbox was stopped while it started")]
    Stopped,
    /// The guest did not become ready.
    #[error("{0}")]
    Boot(String),
    /// Another program of ours answered with an error, which is passed on as it is.
    #[error("{context}{status}")]
    Remote {
        /// "", or what was asked of whom, with a colon.
        context: String,
        /// Its answer.
        status: Status,
    },
}

impl Error {
    /// For `map_err` on a step on the host.
    pub fn host(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Host { action, source }
    }

    /// For `map_err` on a call to the launcher or the config-service.
    pub fn remote(context: impl Into<String>) -> impl FnOnce(ttrpc::Error) -> Self {
        let context = format!("{}: ", context.into());
        move |error| Self::Remote { context, status: error.into() }
    }

    /// The code that containerd's client library turns into its own error kinds.
    pub fn code(&self) -> Code {
        match self {
            Self::Usage(_) | Self::InvalidId(_) | Self::ReadBundle { .. } => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::NotFound { .. } | Self::Finished => Code::NOT_FOUND,
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::Host { .. } | Self::Boot(_) => Code::UNKNOWN,
            Self::Stopped => Code::CANCELLED,
            Self::Remote { status, .. } => status.code,
        }
    }
}

impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Self {
        Self::Remote { context: String::new(), status: error.into() }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Status::of(error.code(), &error).into()
    }
}
