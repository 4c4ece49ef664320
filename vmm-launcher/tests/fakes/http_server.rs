//! The other side of a hypervisor's HTTP API, for fakes of hypervisors: a server on one end of a socket pair.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
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
use tokio::net::UnixStream;

/// What a request is answered: a status, and a body unless there is none.
pub type Answer = (StatusCode, Option<Value>);

/// Has `answer` answer every request, one after the other; the client's end. A body that is no JSON is null.
pub fn serve(answer: impl FnMut(&Method, &str, Option<Value>) -> Answer + Send + 'static) -> UnixStream {
    let (client, server) = UnixStream::pair().unwrap();
    let answer = Arc::new(Mutex::new(answer));
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let body = (!body.is_empty()).then(|| serde_json::from_slice(&body).unwrap_or_default());
            let (status, body) = (answer.lock().unwrap())(&head.method, head.uri.path(), body);
            let body = body.map(|body| body.to_string()).unwrap_or_default();
            let response = Response::builder().status(status).body(Full::<Bytes>::from(body)).unwrap();
            Ok::<_, Infallible>(response)
        }
    });
    tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(server), service));
    client
}
