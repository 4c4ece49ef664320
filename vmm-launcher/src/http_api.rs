//! A client of a hypervisor's HTTP API on a Unix socket: JSON there and back, one request at a time.
//!
//! The hypervisor runs beside a hostile guest, so its answers are bounded, and every request has a deadline.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1::{SendRequest, handshake},
    header::{ACCEPT, CONTENT_TYPE},
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    net::UnixStream,
    sync::{Mutex, OwnedMutexGuard},
    time::timeout,
};

use crate::{
    Error, Result,
    descriptors::{Connection, Luggage},
};

/// An API answers at once, unless the host is very busy.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// The longest answer that is asked for, a VM's whole configuration, has some KiB.
const MAX_ANSWER: usize = 1 << 20;

/// A connection to one hypervisor's API.
#[derive(Debug)]
pub struct HttpApi {
    hypervisor: &'static str,
    /// What all paths begin with.
    prefix: &'static str,
    line: Arc<Mutex<Line>>,
}

impl HttpApi {
    /// A client on `stream`; `hypervisor` is its name in errors, and every path follows `prefix`. The hypervisor need not
    /// have taken the connection yet.
    ///
    /// # Errors
    /// When the connection has ended already.
    pub async fn over(hypervisor: &'static str, prefix: &'static str, stream: UnixStream) -> Result<Self> {
        let (stream, luggage) = Connection::over(stream);
        let (connection, work) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Error::Hypervisor(format!("{hypervisor}'s API cannot be used: {error}")))?;
        // Ends with the connection; whoever waits for an answer is told.
        tokio::spawn(async move { drop(work.await) });
        Ok(Self { hypervisor, prefix, line: Arc::new(Mutex::new(Line { connection, luggage })) })
    }

    /// `GET path`.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub async fn get(&self, path: &str) -> Result<Value> {
        self.request(Method::GET, path, None, DEADLINE).await
    }

    /// `PUT path` with `body`.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub async fn put(&self, path: &str, body: &Value) -> Result<Value> {
        self.request(Method::PUT, path, Some(body), DEADLINE).await
    }

    /// `PUT path` without a body.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub async fn act(&self, path: &str) -> Result<Value> {
        self.request(Method::PUT, path, None, DEADLINE).await
    }

    /// `PATCH path` with `body`.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub async fn patch(&self, path: &str, body: &Value) -> Result<Value> {
        self.request(Method::PATCH, path, Some(body), DEADLINE).await
    }

    /// Has the hypervisor do something, and answers what it answers; null when that is nothing.
    ///
    /// # Errors
    /// The hypervisor's own words when it refuses; when it does not answer in time or has ended.
    pub async fn request(&self, method: Method, path: &str, body: Option<&Value>, limit: Duration) -> Result<Value> {
        self.request_with(method, path, body, Vec::new(), limit).await
    }

    /// [`Self::request`] that gives the hypervisor `descriptors` along.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub async fn request_with(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Value> {
        let path = format!("{}{path}", self.prefix);
        let failed = |why: String| Error::Hypervisor(format!("{}'s {method} {path}: {why}", self.hypervisor));
        let mut request = Request::builder().method(&method).uri(&path).header(ACCEPT, "application/json");
        let body = match body {
            Some(body) => {
                request = request.header(CONTENT_TYPE, "application/json");
                Full::from(body.to_string())
            }
            None => Full::default(),
        };
        let request = request.body(body).map_err(|error| failed(error.to_string()))?;
        let seconds = limit.as_secs();
        let line = timeout(limit, self.line.clone().lock_owned()).await;
        let line =
            line.map_err(|_| failed(format!("not sent, since an earlier request has no answer in {seconds} s")))?;
        // It goes on until the answer is read, for whoever comes next: without its end the connection would be lost.
        let exchange = tokio::spawn(exchange(line, request, descriptors));
        match timeout(limit, exchange).await {
            Ok(Ok(answer)) => {
                answer.map_err(|why| failed(why.unwrap_or_else(|| format!("{} hung up", self.hypervisor))))
            }
            Ok(Err(_)) => Err(failed("the launcher ends".into())),
            Err(_) => Err(failed(format!("no answer in {seconds} s"))),
        }
    }
}

/// What there is one of: who has it waits for an answer.
#[derive(Debug)]
struct Line {
    connection: SendRequest<Full<Bytes>>,
    luggage: Luggage,
}

/// Sends `request` and reads its answer to the end. Why it failed; nothing when the hypervisor hung up.
async fn exchange(
    mut line: OwnedMutexGuard<Line>,
    request: Request<Full<Bytes>>,
    descriptors: Vec<OwnedFd>,
) -> Result<Value, Option<String>> {
    let Line { connection, luggage } = &mut *line;
    connection.ready().await.map_err(|_| None)?;
    let _waiting = luggage.add(descriptors);
    let answer: Response<Incoming> = connection.send_request(request).await.map_err(|_| None)?;
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, MAX_ANSWER).collect().await;
    let body = body.map_err(|error| Some(format!("its answer cannot be read: {error}")))?.to_bytes();
    let value = serde_json::from_slice(&body);
    if !head.status.is_success() {
        let words = value.ok().as_ref().and_then(words);
        let words = words.unwrap_or_else(|| String::from_utf8_lossy(&body).trim().to_owned());
        return Err(Some(if words.is_empty() { head.status.to_string() } else { words }));
    }
    if body.is_empty() { Ok(Value::Null) } else { value.map_err(|error| Some(error.to_string())) }
}

/// Why a request was refused: Firecracker answers an object, Cloud Hypervisor a chain of causes.
fn words(refusal: &Value) -> Option<String> {
    match refusal {
        Value::Array(causes) => Some(causes.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(": ")),
        _ => refusal["fault_message"].as_str().map(|words| words.trim().trim_end_matches('.').to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A hypervisor that answers one request with `answer` and hangs up; afterwards what it heard.
    async fn exchange(answer: &'static str, body: Option<Value>) -> (Result<Value>, String) {
        let (near, mut far) = UnixStream::pair().unwrap();
        let api = HttpApi::over("Fake", "", near).await.unwrap();
        let peer = tokio::spawn(async move {
            let mut heard = vec![0; 4096];
            let count = far.read(&mut heard).await.unwrap();
            far.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(heard[..count].to_vec()).unwrap()
        });
        let answer = api.request(Method::PUT, "/thing", body.as_ref(), DEADLINE).await;
        (answer, peer.await.unwrap())
    }

    #[tokio::test]
    async fn an_answer_without_a_body_is_null() {
        let (answer, heard) = exchange("HTTP/1.1 204 \r\n\r\n", Some(json!({ "a": 1 }))).await;
        assert_eq!(answer.unwrap(), Value::Null);
        assert!(heard.starts_with("PUT /thing HTTP/1.1\r\n"), "{heard}");
        assert!(heard.ends_with("\r\n\r\n{\"a\":1}"), "{heard}");
    }

    #[tokio::test]
    async fn a_fault_message_is_told() {
        let fault = "HTTP/1.1 400 \r\nContent-Length: 30\r\n\r\n{\"fault_message\":\"No kernel.\"}";
        let (answer, _) = exchange(fault, None).await;
        assert_eq!(answer.unwrap_err().to_string(), "Fake's PUT /thing: No kernel");
    }

    #[tokio::test]
    async fn a_chain_of_causes_is_told_in_order() {
        let chain = "HTTP/1.1 500 \r\nContent-Length: 18\r\n\r\n[\"No VM\",\"no API\"]";
        let (answer, _) = exchange(chain, None).await;
        assert_eq!(answer.unwrap_err().to_string(), "Fake's PUT /thing: No VM: no API");
    }

    #[tokio::test]
    async fn a_hypervisor_that_hangs_up_is_told() {
        let (answer, _) = exchange("", None).await;
        assert_eq!(answer.unwrap_err().to_string(), "Fake's PUT /thing: Fake hung up");
    }

    #[tokio::test]
    async fn an_endless_answer_is_not_read_to_its_end() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let api = HttpApi::over("Fake", "", near).await.unwrap();
        tokio::spawn(async move {
            let _ = far.read(&mut [0; 4096]).await;
            let head = b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n";
            let _ = far.write_all(head).await;
            while far.write_all(&[b' '; 4096]).await.is_ok() {}
        });
        let answer = api.get("/").await.unwrap_err().to_string();
        assert!(answer.starts_with("Fake's GET /: its answer cannot be read: "), "{answer}");
    }

    /// A hypervisor that answers the number of each request, and the first only when it is told to.
    async fn slow_counter() -> (HttpApi, tokio::sync::oneshot::Sender<()>) {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (answer_first, first) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            let (mut first, mut number) = (Some(first), 0);
            while let Ok(1..) = far.read(&mut [0; 4096]).await {
                number += 1;
                if let Some(first) = first.take() {
                    first.await.unwrap();
                }
                let answer = format!("HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\n{number}");
                far.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (HttpApi::over("Fake", "", near).await.unwrap(), answer_first)
    }

    #[tokio::test]
    async fn a_hypervisor_that_was_late_once_is_asked_again() {
        let (api, answer_first) = slow_counter().await;
        let late = api.request(Method::GET, "/", None, Duration::from_millis(10)).await.unwrap_err();
        assert_eq!(late.to_string(), "Fake's GET /: no answer in 0 s");
        let next = api.request(Method::GET, "/", None, Duration::from_millis(10)).await.unwrap_err();
        assert_eq!(next.to_string(), "Fake's GET /: not sent, since an earlier request has no answer in 0 s");
        answer_first.send(()).unwrap();
        assert_eq!(api.get("/").await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_caller_that_loses_interest_does_not_disturb_the_next() {
        let (api, answer_first) = slow_counter().await;
        assert!(timeout(Duration::from_millis(10), api.get("/")).await.is_err());
        answer_first.send(()).unwrap();
        assert_eq!(api.get("/").await.unwrap(), 2);
    }
}
