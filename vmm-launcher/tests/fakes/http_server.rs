//! The other side of a hypervisor's HTTP API, for fakes of hypervisors: a server on one end of a socket pair.

use std::{
    convert::Infallible,
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

#[path = "receive.rs"]
mod receive;

/// What a request is answered: a status, and a body unless there is none.
pub type Answer = (StatusCode, Option<Value>);

/// A request. A body that is no JSON is null.
pub struct Asked<'a> {
    pub method: &'a Method,
    pub path: &'a str,
    pub body: Option<Value>,
    /// Those that came along.
    #[allow(dead_code)]
    pub descriptors: Vec<OwnedFd>,
}

/// Has `answer` answer every request, one after the other; the client's end.
pub fn serve(answer: impl FnMut(Asked<'_>) -> Answer + Send + 'static) -> UnixStream {
    let (client, server) = UnixStream::pair().unwrap();
    let came = Descriptors::default();
    let server = Server { socket: server, came: came.clone() };
    let answer = Arc::new(Mutex::new(answer));
    let service = service_fn(move |request: Request<Incoming>| {
        let (answer, came) = (answer.clone(), came.clone());
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let body = (!body.is_empty()).then(|| serde_json::from_slice(&body).unwrap_or_default());
            let descriptors = std::mem::take(&mut *came.lock().unwrap());
            let asked = Asked { method: &head.method, path: head.uri.path(), body, descriptors };
            let (status, body) = (answer.lock().unwrap())(asked);
            let body = body.map(|body| body.to_string()).unwrap_or_default();
            let response = Response::builder().status(status).body(Full::<Bytes>::from(body)).unwrap();
            Ok::<_, Infallible>(response)
        }
    });
    tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(server), service));
    client
}

type Descriptors = Arc<Mutex<Vec<OwnedFd>>>;

/// The server's end.
struct Server {
    socket: UnixStream,
    /// Since the last request.
    came: Descriptors,
}

impl AsyncRead for Server {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { socket, came } = self.get_mut();
        loop {
            ready!(socket.poll_read_ready(context))?;
            let room = buffer.initialize_unfilled();
            match socket.try_io(Interest::READABLE, || receive::receive(&*socket, room)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok((count, descriptors)) => {
                    came.lock().unwrap().extend(descriptors);
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Server {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
