//! Why something could not be done, in words for people and with the code that the host gets to see.

use std::{fmt, io};

use caisson_protocol::status::{Code, Status};

/// What every fallible function of this crate answers.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure. The text names what was tried, on what, and why it failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("{what}")]
    System {
        /// What was tried, on what.
        what: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// It is not there.
    #[error("{0}")]
    NotFound(String),
    /// It is there already.
    #[error("{0}")]
    AlreadyExists(String),
    /// Not in this state.
    #[error("{0}")]
    WrongState(String),
    /// The request cannot be meant.
    #[error("{0}")]
    Invalid(String),
    /// It took too long.
    #[error("{0}")]
    TooLate(String),
    /// A container's process could not be made.
    #[error("{0}")]
    Launch(String),
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::System { .. } | Self::Launch(_) => Code::INTERNAL,
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::WrongState(_) => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::TooLate(_) => Code::DEADLINE_EXCEEDED,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Status::of(error.code(), &error).into()
    }
}

/// Says what was tried when the kernel refuses it.
pub trait Attempt<T> {
    /// Turns a refusal into an [`Error::System`] that begins with `what`.
    ///
    /// # Errors
    /// When `self` is one.
    fn attempt(self, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn attempt(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error::System { what: what.to_string(), source: error.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_tells_what_was_tried_and_why_it_failed() {
        let error = Err::<(), _>(nix::errno::Errno::ENOENT).attempt("mount /dev/vdb on /x").unwrap_err();
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else { panic!("not a status") };
        assert!(status.message.starts_with("mount /dev/vdb on /x: No such file"), "{}", status.message);
        assert_eq!(status.code(), Code::INTERNAL);
    }

    #[test]
    fn something_missing_is_not_found() {
        let ttrpc::Error::RpcStatus(status) = Error::NotFound("no container web".into()).into() else {
            panic!("not a status")
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
    }
}
