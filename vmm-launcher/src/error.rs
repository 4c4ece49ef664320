//! Why a launcher's work fails, and the status code that goes with it.

use std::{io, path::PathBuf};

use caisson_protocol::status::{Code, Status};

use crate::vsock;

/// This crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be carried out as it stands, wherever it is tried.
    #[error("{0}")]
    Invalid(String),
    /// A file that the request names cannot be used.
    #[error("open the {what} {path}")]
    File {
        /// What the file is to the VM: "guest kernel".
        what: &'static str,
        /// As the request has it.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The VM's state forbids the call.
    #[error("cannot {verb} a VM that is {state}")]
    WrongState {
        /// What was asked for.
        verb: &'static str,
        /// In words: "running".
        state: &'static str,
    },
    /// The hypervisor cannot do it, and why.
    #[error("{0}")]
    Unsupported(String),
    /// `Stop` came while `Create` was under way.
    #[error("the VM was stopped while it was being created")]
    Stopped,
    /// The host refused something.
    #[error("{action}")]
    Host {
        /// What was tried, on what.
        action: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The hypervisor or one of its helpers failed, in its own words.
    #[error("{0}")]
    Hypervisor(String),
    /// The VM's vsock device cannot be set up.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
}

impl Error {
    /// Turns an I/O error into [`Error::Host`]: `.map_err(Error::host("make a socket pair"))`.
    pub fn host(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Host { action, source }
    }

    /// The code for programs.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) | Self::File { .. } | Self::Vsock(vsock::Error::PathTooLong { .. }) => {
                Code::INVALID_ARGUMENT
            }
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Stopped => Code::CANCELLED,
            Self::Host { .. } | Self::Vsock(_) => Code::INTERNAL,
            Self::Hypervisor(_) => Code::UNAVAILABLE,
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::of(error.code(), &error)
    }
}
