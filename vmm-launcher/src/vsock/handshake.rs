//! The first line of a host program's connection: `CONNECT <port>\n`.
//!
//! The line is looked at without being taken from the socket until it is complete, so that a
//! waiting client costs a descriptor and no buffer, and what follows the line is left alone.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, recv};

/// `CONNECT 4294967295\n` is 19 bytes; nothing longer can be a request.
const LINE_LIMIT: usize = 32;

/// What a client has said so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Handshake {
    /// No complete line yet.
    Waiting,
    /// A request for this guest port.
    Connect(u32),
    /// Something else, or the end.
    Invalid,
}

/// Looks at the non-blocking `client`'s first line and consumes it when it is complete.
pub fn read(mut client: &UnixStream) -> Handshake {
    let mut line = [0; LINE_LIMIT];
    let length = match recv(client.as_raw_fd(), &mut line, MsgFlags::MSG_PEEK) {
        Ok(0) => return Handshake::Invalid,
        Ok(length) => length,
        Err(error) if io::Error::from(error).kind() == io::ErrorKind::WouldBlock => {
            return Handshake::Waiting;
        }
        Err(_) => return Handshake::Invalid,
    };
    match line[..length].iter().position(|byte| *byte == b'\n') {
        None if length < LINE_LIMIT => Handshake::Waiting,
        None => Handshake::Invalid,
        Some(end) => match (parse(&line[..end]), client.read_exact(&mut line[..=end])) {
            (Some(port), Ok(())) => Handshake::Connect(port),
            _ => Handshake::Invalid,
        },
    }
}

/// `CONNECT <port>`, without the newline.
fn parse(line: &[u8]) -> Option<u32> {
    let port = str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn after_writing(text: &[u8]) -> (Handshake, UnixStream, UnixStream) {
        let (mut client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        client.write_all(text).unwrap();
        (read(&server), client, server)
    }

    #[test]
    fn a_complete_line_names_the_port_and_leaves_what_follows() {
        let (handshake, client, mut server) = after_writing(b"CONNECT 1024\nrest");
        assert_eq!(handshake, Handshake::Connect(1024));
        drop(client);
        let mut rest = String::new();
        server.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "rest");
    }

    #[test]
    fn half_a_line_waits_and_is_complete_later() {
        let (handshake, mut client, server) = after_writing(b"CONNECT 10");
        assert_eq!(handshake, Handshake::Waiting);
        client.write_all(b"24\n").unwrap();
        assert_eq!(read(&server), Handshake::Connect(1024));
    }

    #[test]
    fn nothing_yet_waits() {
        assert_eq!(after_writing(b"").0, Handshake::Waiting);
    }

    #[test]
    fn a_port_over_32_bits_is_invalid() {
        assert_eq!(after_writing(b"CONNECT 4294967296\n").0, Handshake::Invalid);
    }

    #[test]
    fn a_signed_port_is_invalid() {
        assert_eq!(after_writing(b"CONNECT +5\n").0, Handshake::Invalid);
    }

    #[test]
    fn another_word_is_invalid() {
        assert_eq!(after_writing(b"GET / HTTP/1.1\r\n").0, Handshake::Invalid);
    }

    #[test]
    fn a_line_without_end_is_invalid() {
        assert_eq!(after_writing(&[b'1'; LINE_LIMIT]).0, Handshake::Invalid);
    }

    #[test]
    fn a_client_that_left_is_invalid() {
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(read(&server), Handshake::Invalid);
    }
}
