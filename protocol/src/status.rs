//! The one place where an error becomes a ttrpc status, and a ttrpc status becomes an error again.

use std::{error::Error, fmt};

pub use ttrpc::Code;

/// What a failed call says: a code for programs, a sentence for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// Chosen once, where the error happened.
    pub code: Code,
    /// What was attempted, on what, and why it failed.
    pub message: String,
}

impl Status {
    /// A status in words of its own.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// A status that tells `error` and all its causes.
    pub fn of(code: Code, error: &dyn Error) -> Self {
        Self::new(code, sentence(error))
    }

    /// The answer to a request for something that is not there to be had.
    pub fn unimplemented(what: impl fmt::Display) -> Self {
        Self::new(Code::UNIMPLEMENTED, format!("{what} is not supported"))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Status {}

impl From<Status> for ttrpc::Error {
    fn from(status: Status) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(status.code, status.message))
    }
}

impl From<ttrpc::Error> for Status {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                Self::new(status.code.enum_value().unwrap_or(Code::UNKNOWN), status.message)
            }
            ttrpc::Error::RemoteClosed | ttrpc::Error::LocalClosed | ttrpc::Error::Eof => {
                Self::new(Code::UNAVAILABLE, "the connection was closed")
            }
            ttrpc::Error::Socket(cause) | ttrpc::Error::Others(cause) => {
                // ttrpc tells of a passed deadline in words only.
                let code = if cause.contains("timeout") || cause.contains("elapsed") {
                    Code::DEADLINE_EXCEEDED
                } else {
                    Code::UNAVAILABLE
                };
                Self::new(code, cause)
            }
            other => Self::of(Code::UNKNOWN, &other),
        }
    }
}

/// `error` and its causes as one sentence: "read bundle config /x: No such file or directory".
pub fn sentence(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("read bundle config /x")]
    struct ReadConfig(#[source] std::io::Error);

    #[test]
    fn a_sentence_ends_with_the_cause() {
        let error = ReadConfig(std::io::Error::other("disk on fire"));
        assert_eq!(sentence(&error), "read bundle config /x: disk on fire");
    }

    #[test]
    fn a_status_survives_the_way_over_the_wire() {
        let status = Status::new(Code::NOT_FOUND, "no container web");
        assert_eq!(Status::from(ttrpc::Error::from(status.clone())), status);
    }

    #[test]
    fn a_closed_connection_is_unavailable() {
        assert_eq!(Status::from(ttrpc::Error::RemoteClosed).code, Code::UNAVAILABLE);
    }
}
