//! Descriptors that another process gets along with a message, `SCM_RIGHTS` of unix(7).

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

/// Sends what `socket` takes of `bytes`, which are some, and `descriptors` along with the first of them.
///
/// # Errors
/// When the other end is gone; then nothing was sent.
pub(crate) async fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    socket.async_io(Interest::WRITABLE, || send_now(socket, bytes, descriptors)).await
}

fn send_now(socket: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    // None is no message.
    let control = if numbers.is_empty() { &control[..0] } else { &control };
    Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// A connection for a protocol that knows of bytes only.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: UnixStream,
    luggage: Luggage,
}

impl Connection {
    pub(crate) fn over(socket: UnixStream) -> (Self, Luggage) {
        let luggage = Luggage::default();
        (Self { socket, luggage: luggage.clone() }, luggage)
    }
}

/// Descriptors that go along with what is written next.
#[derive(Clone, Debug, Default)]
pub(crate) struct Luggage(Arc<Mutex<Vec<OwnedFd>>>);

impl Luggage {
    /// Has `descriptors` go along, unless the answer is dropped before.
    pub(crate) fn add(&self, descriptors: Vec<OwnedFd>) -> Waiting<'_> {
        *self.lock() = descriptors;
        Waiting(self)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.0.lock().expect("nobody panics with the luggage")
    }
}

/// Takes back what was not sent when it is dropped.
#[derive(Debug)]
pub(crate) struct Waiting<'a>(&'a Luggage);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.lock().clear();
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Self { socket, luggage } = self.get_mut();
        let mut descriptors = luggage.lock();
        loop {
            ready!(socket.poll_write_ready(context))?;
            match socket.try_io(Interest::WRITABLE, || send_now(socket, bytes, &descriptors)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    descriptors.clear();
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, pipe},
        os::unix::net::UnixStream as StdUnixStream,
    };

    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::receive::receive;

    fn connection() -> (Connection, Luggage, StdUnixStream) {
        let (near, far) = StdUnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let (connection, luggage) = Connection::over(UnixStream::from_std(near).unwrap());
        (connection, luggage, far)
    }

    #[tokio::test]
    async fn descriptors_go_along_with_the_first_bytes_and_not_with_the_next() {
        let (mut connection, luggage, far) = connection();
        let (mut reader, writer) = pipe().unwrap();
        let _waiting = luggage.add(vec![writer.into()]);
        connection.write_all(b"first").await.unwrap();
        let (count, descriptors) = receive(&far, &mut [0; 16]).unwrap();
        assert_eq!((count, descriptors.len()), (5, 1));
        connection.write_all(b"next").await.unwrap();
        assert_eq!(receive(&far, &mut [0; 16]).unwrap().1.len(), 0);
        // Nobody here has what was sent any more.
        drop(descriptors);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[tokio::test]
    async fn what_was_not_sent_is_closed() {
        let (mut connection, luggage, far) = connection();
        let (mut reader, writer) = pipe().unwrap();
        drop(luggage.add(vec![writer.into()]));
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        connection.write_all(b"first").await.unwrap();
        assert_eq!(receive(&far, &mut [0; 16]).unwrap().1.len(), 0);
    }
}
