//! The one connection to the host: the agent dials it, and serves both contracts on it.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use caisson_protocol::{
    address::{Address, agent_port},
    containerd::shim_async::create_task,
    guest_ttrpc::create_guest,
};
use futures_util::stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};
use ttrpc::asynchronous::{
    Server,
    transport::{Listener, Socket},
};

use crate::{
    error::{Attempt, Error, Result},
    guest_service::GuestService,
    sys,
    task_service::TaskService,
};

/// `VMADDR_CID_HOST`, `vsock(7)`.
const HOST: u32 = 2;

/// `VMADDR_CID_ANY`, `vsock(7)`: what the kernel answers when no device gave it an address.
const ANY_CID: u32 = u32::MAX;

/// Calls the host, which listens before it starts the guest.
///
/// # Errors
/// When the guest has no vsock device, or the host does not answer.
pub async fn call() -> Result<Socket> {
    let cid = sys::local_cid().attempt("find the guest's vsock address")?;
    if cid == ANY_CID {
        return Err(Error::NotFound("the guest has no vsock device to call the host by".into()));
    }
    let host = Address::Vsock { cid: HOST, port: agent_port(cid) };
    let stream = host.connect().await.attempt(format_args!("call the host at {host}"))?;
    Ok(stream.into_ttrpc())
}

/// Serves on `connection` until it ends.
///
/// # Errors
/// When the server cannot start.
pub async fn serve(connection: Socket, guest: GuestService) -> Result<()> {
    let (ended, end) = oneshot::channel();
    let connection = Connection { socket: connection, ended: Some(ended) };
    let mut server = Server::new()
        .add_listener(Listener::new(stream::iter([Ok(connection)])))
        .register_service(create_task(Arc::new(TaskService(guest.containers.clone()))))
        .register_service(create_guest(Arc::new(guest)));
    server.start().await.map_err(|error| Error::WrongState(format!("serve the host: {error}")))?;
    // The sender goes with the connection at the latest.
    let _ = end.await;
    Ok(())
}

/// Tells when the other side has gone: the server keeps that to itself.
struct Connection {
    socket: Socket,
    ended: Option<oneshot::Sender<()>>,
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.socket).poll_read(cx, buffer);
        let is_end = match &read {
            Poll::Ready(Ok(())) => buffer.filled().len() == before && buffer.remaining() > 0,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if is_end {
            self.ended.take();
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
