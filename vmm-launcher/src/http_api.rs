//! A client of a hypervisor's HTTP API on a Unix socket: JSON there and back, one request at a time.
//!
//! The hypervisor runs beside a hostile guest, so its answers are bounded, and every request has a deadline.

use std::{os::fd::OwnedFd, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1::{SendRequest, handshake},
    header::{ACCEPT, CONTENT_TYPE},
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::UnixStream, sync::Mutex, time::timeout};

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
    connection: Mutex<SendRequest<Full<Bytes>>>,
    luggage: Luggage,
}

impl HttpApi {
    /// A client on `stream`; `hypervisor` is its name in errors. The hypervisor need not have taken the connection yet.
    ///
    /// # Errors
    /// When the connection has ended already.
    pub async fn over(hypervisor: &'static str, stream: UnixStream) -> Result<Self> {
        let (stream, luggage) = Connection::over(stream);
        let (connection, work) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Error::Hypervisor(format!("{hypervisor}'s API cannot be used: {error}")))?;
        // Ends with the connection; whoever waits for an answer is told.
        tokio::spawn(async move { drop(work.await) });
        Ok(Self { hypervisor, connection: Mutex::new(connection), luggage })
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
        let failed = |why: String| Error::Hypervisor(format!("{}'s {method} {path}: {why}", self.hypervisor));
        let hung_up = |_| failed(format!("{} hung up", self.hypervisor));
        let mut request = Request::builder().method(&method).uri(path).header(ACCEPT, "application/json");
        let body = match body {
            Some(body) => {
                request = request.header(CONTENT_TYPE, "application/json");
                Full::from(body.to_string())
            }
            None => Full::default(),
        };
        let request = request.body(body).map_err(|error| failed(error.to_string()))?;
        let exchange = async {
            let mut connection = self.connection.lock().await;
            connection.ready().await.map_err(hung_up)?;
            let _waiting = self.luggage.add(descriptors);
            let answer: Response<Incoming> = connection.send_request(request).await.map_err(hung_up)?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await;
            let body = body.map_err(|error| failed(format!("its answer cannot be read: {error}")))?.to_bytes();
            let value = serde_json::from_slice(&body);
            if !head.status.is_success() {
                let words = value.ok().as_ref().and_then(words);
                let words = words.unwrap_or_else(|| String::from_utf8_lossy(&body).trim().to_owned());
                return Err(failed(if words.is_empty() { head.status.to_string() } else { words }));
            }
            if body.is_empty() { Ok(Value::Null) } else { value.map_err(|error| failed(error.to_string())) }
        };
        let answer = timeout(limit, exchange).await;
        answer.unwrap_or_else(|_| Err(failed(format!("no answer in {} s", limit.as_secs()))))
    }
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
        let api = HttpApi::over("Fake", near).await.unwrap();
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
        let api = HttpApi::over("Fake", near).await.unwrap();
        tokio::spawn(async move {
            let _ = far.read(&mut [0; 4096]).await;
            let head = b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n";
            let _ = far.write_all(head).await;
            while far.write_all(&[b' '; 4096]).await.is_ok() {}
        });
        let answer = api.get("/").await.unwrap_err().to_string();
        assert!(answer.starts_with("Fake's GET /: its answer cannot be read: "), "{answer}");
    }
}
