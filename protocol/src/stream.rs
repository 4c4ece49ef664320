//! How the bytes of standard streams travel: moved by the kernel from one descriptor to the other, never by RPC.
//!
//! `splice(2)` needs a pipe at one end. Between two descriptors that are none (a terminal and a socket), a buffer
//! takes its place.

use std::{
    io::{self, ErrorKind},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// What one splice may move: a pipe's usual capacity.
const CHUNK: usize = 64 * 1024;

/// Moves bytes until `from` ends or `to` no longer takes them, and says how many it moved. Both descriptors close.
///
/// # Errors
/// When reading or writing fails for another reason than the other side having gone.
pub async fn copy(from: OwnedFd, to: OwnedFd) -> io::Result<u64> {
    let (from, to) = (Ready::new(from)?, Ready::new(to)?);
    let mut buffer = Vec::new();
    let mut total = 0;
    loop {
        match move_chunk(&from, &to, &mut buffer).await {
            Ok(0) => return Ok(total),
            Ok(count) => total += count as u64,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected
                ) =>
            {
                return Ok(total);
            }
            // A terminal whose last user has gone.
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => return Ok(total),
            Err(error) => return Err(error),
        }
    }
}

async fn move_chunk(from: &Ready, to: &Ready, buffer: &mut Vec<u8>) -> io::Result<usize> {
    loop {
        from.wait(Interest::READABLE).await?;
        to.wait(Interest::WRITABLE).await?;
        if !buffer.is_empty() {
            return copy_chunk(from, to, buffer).await;
        }
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        match splice(from.fd(), None, to.fd(), None, CHUNK, flags) {
            Ok(count) => return Ok(count),
            Err(Errno::EAGAIN) => {
                // Either side may be the one that is not ready: ask, and wait for that one.
                from.forget_unless(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR, Interest::READABLE)
                    .await?;
                to.forget_unless(PollFlags::POLLOUT | PollFlags::POLLERR, Interest::WRITABLE).await?;
            }
            Err(Errno::EINVAL) => buffer.resize(CHUNK / 4, 0),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn copy_chunk(from: &Ready, to: &Ready, buffer: &mut [u8]) -> io::Result<usize> {
    let count = from.io(Interest::READABLE, |fd| Ok(nix::unistd::read(fd, buffer)?)).await?;
    let mut rest = &buffer[..count];
    while !rest.is_empty() {
        let written = to.io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, rest)?)).await?;
        rest = &rest[written..];
    }
    Ok(count)
}

/// A descriptor that can be waited for; a regular file is always ready.
enum Ready {
    Event(AsyncFd<OwnedFd>),
    Always(OwnedFd),
}

impl Ready {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        match sys::register(fd) {
            Ok(fd) => Ok(Self::Event(fd)),
            Err((fd, error)) if error.raw_os_error() == Some(Errno::EPERM as i32) => Ok(Self::Always(fd)),
            Err((_, error)) => Err(error),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Event(fd) => fd.as_fd(),
            Self::Always(fd) => fd.as_fd(),
        }
    }

    async fn wait(&self, interest: Interest) -> io::Result<()> {
        match self {
            Self::Event(fd) => fd.ready(interest).await.map(drop),
            Self::Always(_) => Ok(()),
        }
    }

    async fn forget_unless(&self, events: PollFlags, interest: Interest) -> io::Result<()> {
        let Self::Event(fd) = self else { return Ok(()) };
        let mut guard = fd.ready(interest).await?;
        let mut poll_fd = [PollFd::new(fd.as_fd(), events)];
        if poll(&mut poll_fd, PollTimeout::ZERO)? == 1 {
            return Ok(());
        }
        // An event from now on is not forgotten: it is a new one.
        guard.clear_ready();
        drop(guard);
        self.wait(interest).await
    }

    async fn io<R>(
        &self,
        interest: Interest,
        mut action: impl FnMut(BorrowedFd<'_>) -> io::Result<R>,
    ) -> io::Result<R> {
        match self {
            Self::Event(fd) => fd.async_io(interest, |fd| action(fd.as_fd())).await,
            Self::Always(fd) => action(fd.as_fd()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        os::unix::net::UnixStream,
        thread,
    };

    use super::*;

    const LENGTH: usize = 3 * CHUNK + 17;

    fn pattern() -> Vec<u8> {
        (0..LENGTH).map(|index| (index % 251) as u8).collect()
    }

    fn read_all(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
        thread::spawn(move || {
            let mut heard = Vec::new();
            from.read_to_end(&mut heard).unwrap();
            heard
        })
    }

    fn write_all(to: impl Into<OwnedFd>) {
        let mut to = File::from(to.into());
        thread::spawn(move || to.write_all(&pattern()).unwrap());
    }

    #[tokio::test]
    async fn a_pipe_reaches_a_socket_unchanged() {
        let (pipe_out, pipe_in) = nix::unistd::pipe().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        write_all(pipe_in);
        let heard = read_all(far);
        assert_eq!(copy(pipe_out, near.into()).await.unwrap(), LENGTH as u64);
        assert_eq!(heard.join().unwrap(), pattern());
    }

    #[tokio::test]
    async fn a_socket_that_pauses_and_then_ends_reaches_a_pipe_unchanged() {
        let (pipe_out, pipe_in) = nix::unistd::pipe().unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        let heard = read_all(File::from(pipe_out));
        let copying = tokio::spawn(copy(near.into(), pipe_in));
        far.write_all(b"first ").unwrap();
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        far.write_all(b"second").unwrap();
        tokio::task::yield_now().await;
        drop(far);
        assert_eq!(copying.await.unwrap().unwrap(), 12);
        assert_eq!(heard.join().unwrap(), b"first second");
    }

    #[tokio::test]
    async fn two_sockets_are_joined_by_a_buffer() {
        let (source, near) = UnixStream::pair().unwrap();
        let (sink, far) = UnixStream::pair().unwrap();
        write_all(source);
        let heard = read_all(far);
        assert_eq!(copy(near.into(), sink.into()).await.unwrap(), LENGTH as u64);
        assert_eq!(heard.join().unwrap(), pattern());
    }

    #[tokio::test]
    async fn a_reader_that_goes_ends_the_copy() {
        let (pipe_out, pipe_in) = nix::unistd::pipe().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        File::from(pipe_in).write_all(b"nobody hears this").unwrap();
        assert_eq!(copy(pipe_out, near.into()).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_regular_file_is_always_ready() {
        let (pipe_out, pipe_in) = nix::unistd::pipe().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        write_all(pipe_in);
        copy(pipe_out, file.try_clone().unwrap().into()).await.unwrap();
        let mut kept = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut kept).unwrap();
        assert_eq!(kept, pattern());
    }
}
