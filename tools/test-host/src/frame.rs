//! One message on the port: its kind in a byte, the length of its content in four (little endian), the content.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

use crate::{Job, Verdict};

/// More than any content has, in bytes.
const MAX_CONTENT: usize = 1 << 20;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The guest waits for its job.
    Ready,
    /// What to do, once.
    Job(Job),
    /// A piece of standard input; an empty one is its end.
    Stdin(Vec<u8>),
    /// A piece of standard output.
    Stdout(Vec<u8>),
    /// A piece of standard error.
    Stderr(Vec<u8>),
    /// The machine's clock has gone on by [`crate::PULSE`].
    Pulse,
    /// The last one that counts.
    Exit(Verdict),
}

impl Frame {
    /// Reads the next one.
    ///
    /// # Errors
    /// When the stream ends or is none of frames.
    pub fn read(mut stream: impl Read) -> io::Result<Self> {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_CONTENT {
            return Err(malformed(format!("a frame of {length} bytes")));
        }
        let mut content = vec![0; length];
        stream.read_exact(&mut content)?;
        match kind {
            b'R' => Ok(Self::Ready),
            b'J' => from_json(&content).map(Self::Job),
            b'0' => Ok(Self::Stdin(content)),
            b'1' => Ok(Self::Stdout(content)),
            b'2' => Ok(Self::Stderr(content)),
            b'P' => Ok(Self::Pulse),
            b'X' => from_json(&content).map(Self::Exit),
            other => Err(malformed(format!("a frame of the unknown kind {other:#04x}"))),
        }
    }

    /// Writes it whole.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn write(&self, mut stream: impl Write) -> io::Result<()> {
        let (kind, content) = match self {
            Self::Ready => (b'R', Vec::new()),
            Self::Job(job) => (b'J', to_json(job)?),
            Self::Stdin(bytes) => (b'0', bytes.clone()),
            Self::Stdout(bytes) => (b'1', bytes.clone()),
            Self::Stderr(bytes) => (b'2', bytes.clone()),
            Self::Pulse => (b'P', Vec::new()),
            Self::Exit(verdict) => (b'X', to_json(verdict)?),
        };
        let length = u32::try_from(content.len()).map_err(io::Error::other)?;
        let frame = [&[kind][..], &length.to_le_bytes(), &content].concat();
        stream.write_all(&frame)
    }
}

fn from_json<T: DeserializeOwned>(content: &[u8]) -> io::Result<T> {
    serde_json::from_slice(content).map_err(|error| malformed(error.to_string()))
}

fn to_json(value: &impl Serialize) -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(value)?)
}

fn malformed(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(frame: &Frame) -> Frame {
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        Frame::read(bytes.as_slice()).unwrap()
    }

    #[test]
    fn every_kind_arrives_as_it_was_sent() {
        let job = Job {
            command: vec!["sh".into(), "-c".into(), "echo 'ü'".into()],
            directory: "/work".into(),
            environment: vec![("A".into(), "b c".into())],
            shared: vec!["/work".into()],
            stdin: true,
        };
        let frames = [
            Frame::Ready,
            Frame::Job(job),
            Frame::Stdin(Vec::new()),
            Frame::Stdout(vec![0, 255]),
            Frame::Stderr(b"x".to_vec()),
            Frame::Pulse,
            Frame::Exit(Ok(137)),
            Frame::Exit(Err("no such program".into())),
        ];
        assert_eq!(frames.each_ref().map(there_and_back), frames);
    }

    #[test]
    fn something_else_than_frames_is_refused() {
        assert!(Frame::read(&b"[    0.0] Linux"[..]).unwrap_err().to_string().contains("bytes"));
        assert!(Frame::read(&b"Z\0\0\0\0"[..]).unwrap_err().to_string().contains("unknown kind 0x5a"));
        assert_eq!(Frame::read(&b"1\x05\0\0\0abc"[..]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
