//! When nobody is connected any more.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
    time::timeout,
};
use ttrpc::asynchronous::transport::{Listener, Socket};

use crate::sys;

/// With so many connections at once, the heap has grown by more than a mebibyte.
const CROWD: usize = 50;
/// With fewer, the crowd has gone. One call's connection may still be seen when the next one's is.
const FEW: usize = 4;

/// How many connections are open.
#[derive(Debug)]
pub struct Connections(watch::Receiver<usize>);

impl Connections {
    /// Counts the connections of `listener`.
    pub fn of(listener: Listener) -> (Listener, Self) {
        let (count, connections) = watch::channel(0);
        let is_crowded = Arc::new(AtomicBool::new(false));
        let listener = listener.map(move |socket| {
            let socket = socket?;
            count.send_modify(|count| *count += 1);
            is_crowded.fetch_or(*count.borrow() >= CROWD, Ordering::Relaxed);
            Ok::<_, io::Error>(Counted { socket, count: count.clone(), is_crowded: Arc::clone(&is_crowded) })
        });
        (Listener::new(listener), Self(connections))
    }

    /// Returns when there was no connection for as long as `limit`.
    pub async fn idle_for(&mut self, limit: Duration) {
        // The sender lives as long as the listener; without one, nobody can connect.
        while self.0.wait_for(|count| *count == 0).await.is_ok() {
            if timeout(limit, self.0.changed()).await.is_err() {
                return;
            }
        }
    }
}

/// A connection that counts for as long as it is open.
struct Counted {
    socket: Socket,
    count: watch::Sender<usize>,
    /// Whether the heap may still be a crowd's.
    is_crowded: Arc<AtomicBool>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.send_modify(|count| *count -= 1);
        if *self.count.borrow() < FEW && self.is_crowded.swap(false, Ordering::Relaxed) {
            sys::trim_heap();
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
