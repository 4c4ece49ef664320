//! A client of QEMU's machine protocol, `docs/interop/qmp-spec.txt` of QEMU: one JSON object per line, answers found by
//! their id. StratoVirt speaks a dialect of it, which wants ids to be strings.
//!
//! The hypervisor runs beside a hostile guest, so its lines are bounded and everything in them is optional.

use std::{
    collections::HashMap,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{
        broadcast::{self, error::RecvError},
        oneshot, watch,
    },
    time::timeout,
};
use tracing::debug;

use crate::{Error, Result, descriptors};

/// An answer comes at once, unless the host is very busy.
const DEADLINE: Duration = Duration::from_secs(20);
/// The longest answer to what we ask has a few KiB.
const MAX_LINE: u64 = 1 << 20;
/// Events that a slow listener may miss.
const EVENTS: usize = 64;

/// A connection to one hypervisor.
#[derive(Debug)]
pub struct Qmp {
    hypervisor: &'static str,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    next_id: AtomicU64,
    shared: Arc<Shared>,
}

/// Why a command returns nothing.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The hypervisor has not carried it out.
    #[error("{words}")]
    Refused {
        /// The protocol's name for what is wrong: `GenericError`, [`DEVICE_NOT_FOUND`], …
        class: String,
        /// The hypervisor's own.
        words: String,
    },
    /// The hypervisor has ended, or is late: what it does with the command is not known.
    #[error("{0}")]
    NoAnswer(String),
}

/// [`Failure::Refused`] by this class: there is no device of that name.
pub const DEVICE_NOT_FOUND: &str = "DeviceNotFound";

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Hypervisor(failure.to_string())
    }
}

/// What a command returns, or the class of the hypervisor's error and its words.
type Answer = Result<Value, (String, String)>;

#[derive(Debug)]
struct Shared {
    /// Who waits for the answer with an id; `None` once the connection has ended.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
    /// The reader has the only one that lasts: by its end listeners learn that no more events come.
    events: broadcast::WeakSender<Value>,
    greeting: watch::Sender<bool>,
    /// Why the VM went down, as the hypervisor says it: `guest-shutdown`, `guest-reset`, …
    shutdown_reason: Mutex<Option<String>>,
}

impl Qmp {
    /// A client, and the connected socket for `hypervisor`, which is its name in errors.
    ///
    /// # Errors
    /// When the host makes no socket pair.
    pub fn pair(hypervisor: &'static str) -> io::Result<(Self, OwnedFd)> {
        let (near, far) = StdUnixStream::pair()?;
        near.set_nonblocking(true)?;
        Ok((Self::over(hypervisor, UnixStream::from_std(near)?), far.into()))
    }

    /// A client on a connection to `hypervisor`, which is its name in errors.
    pub fn over(hypervisor: &'static str, stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        let events = broadcast::Sender::new(EVENTS);
        let shared = Arc::new(Shared {
            waiting: Mutex::new(Some(HashMap::new())),
            events: events.downgrade(),
            greeting: watch::Sender::new(false),
            shutdown_reason: Mutex::new(None),
        });
        tokio::spawn(read(hypervisor, reader, shared.clone(), events));
        Self { hypervisor, writer: writer.into(), next_id: AtomicU64::new(1), shared }
    }

    /// Waits until the hypervisor has started, and leaves the capabilities negotiation behind.
    ///
    /// # Errors
    /// When it refuses.
    pub async fn negotiate(&self) -> Result<()> {
        let mut greeting = self.shared.greeting.subscribe();
        // `self` holds the sender: this does not fail. Who calls watches the process, and has a deadline.
        let _ = greeting.wait_for(|greeted| *greeted).await;
        self.execute("qmp_capabilities", json!({})).await.map(drop)
    }

    /// Has the hypervisor do something, and answers what it answers.
    ///
    /// # Errors
    /// The hypervisor's own words when it refuses; when it does not answer in time or has ended.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.ask(command, arguments).await?)
    }

    /// [`Self::execute`] for who goes on when it fails.
    ///
    /// # Errors
    /// A refusal is told from no answer.
    pub async fn ask(&self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.exchange(command, arguments, &[]).await
    }

    /// Gives the hypervisor a descriptor, which commands then call `name`: no number.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub async fn give(&self, name: &str, descriptor: OwnedFd) -> Result<(), Failure> {
        self.exchange("getfd", json!({ "fdname": name }), &[descriptor]).await.map(drop)
    }

    async fn exchange(&self, command: &str, arguments: Value, descriptors: &[OwnedFd]) -> Result<Value, Failure> {
        let words = |why: &str| format!("{}'s {command}: {why}", self.hypervisor);
        let hung_up = || Failure::NoAnswer(words(&format!("{} has ended", self.hypervisor)));
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = oneshot::channel();
        match &mut *self.shared.waiting.lock().expect("no reader panics") {
            Some(waiting) => waiting.insert(id, tell),
            None => return Err(hung_up()),
        };
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id.to_string() }).to_string();
        line.push('\n');
        let exchange = async {
            self.write(line.as_bytes(), descriptors).await.map_err(|_| hung_up())?;
            match told.await {
                Ok(answer) => answer.map_err(|(class, why)| Failure::Refused { class, words: words(&why) }),
                Err(_) => Err(hung_up()),
            }
        };
        match timeout(DEADLINE, exchange).await {
            Ok(answer) => answer,
            Err(_) => {
                if let Some(waiting) = &mut *self.shared.waiting.lock().expect("no reader panics") {
                    waiting.remove(&id);
                }
                Err(Failure::NoAnswer(words(&format!("no answer in {} s", DEADLINE.as_secs()))))
            }
        }
    }

    async fn write(&self, line: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        let sent = descriptors::send((*writer).as_ref(), line, descriptors).await?;
        writer.write_all(&line[sent..]).await
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<Value> {
        match self.shared.events.upgrade() {
            Some(events) => events.subscribe(),
            // None come any more, which it tells.
            None => broadcast::Sender::new(1).subscribe(),
        }
    }

    /// Waits until one of `events` says something to `listener`, and answers that. So many came that some were missed: then
    /// `listener` hears [`Value::Null`].
    ///
    /// # Errors
    /// The listener's; when the hypervisor has ended.
    pub async fn wait<T>(
        &self,
        events: &mut broadcast::Receiver<Value>,
        mut listener: impl FnMut(&Value) -> Option<Result<T>>,
    ) -> Result<T> {
        loop {
            let event = match events.recv().await {
                Ok(event) => event,
                Err(RecvError::Lagged(_)) => Value::Null,
                Err(RecvError::Closed) => return Err(Error::Hypervisor(format!("{} has ended", self.hypervisor))),
            };
            if let Some(told) = listener(&event) {
                return told;
            }
        }
    }

    /// Waits for one of `events` that has one of `names`, or may be among those that were missed.
    ///
    /// # Errors
    /// When the hypervisor has ended.
    pub async fn next(&self, events: &mut broadcast::Receiver<Value>, names: &[&str]) -> Result<()> {
        let is_named = |event: &Value| event.is_null() || names.iter().any(|name| event["event"] == *name);
        self.wait(events, |event| is_named(event).then_some(Ok(()))).await
    }

    /// The reason in the last `SHUTDOWN` event.
    pub fn shutdown_reason(&self) -> Option<String> {
        self.shared.shutdown_reason.lock().expect("no reader panics").clone()
    }
}

async fn read(hypervisor: &'static str, reader: OwnedReadHalf, shared: Arc<Shared>, events: broadcast::Sender<Value>) {
    let mut reader = BufReader::with_capacity(4096, reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await {
            Ok(1..) if line.ends_with(b"\n") => {}
            // The end, or a line without one.
            _ => break,
        }
        match serde_json::from_slice(&line) {
            Ok(message) => shared.receive(message, &events),
            Err(error) => debug!(%error, "{hypervisor} sent something else than JSON"),
        }
    }
    // Whoever still waits learns that the answer does not come.
    shared.waiting.lock().expect("no caller panics").take();
}

impl Shared {
    fn receive(&self, mut message: Value, events: &broadcast::Sender<Value>) {
        if message.get("QMP").is_some() {
            self.greeting.send_replace(true);
        } else if message.get("return").or(message.get("error")).is_some() {
            let waiting = self.who_asked(&message["id"]);
            let answer = match message.get("error") {
                Some(error) => {
                    let words = error["desc"].as_str().unwrap_or("it failed and does not say why");
                    Err((error["class"].as_str().unwrap_or_default().to_owned(), words.to_owned()))
                }
                None => Ok(message["return"].take()),
            };
            if let Some(waiting) = waiting {
                let _ = waiting.send(answer);
            }
        } else if let Some(event) = message.get("event").and_then(Value::as_str) {
            debug!(event, data = %message["data"], "machine protocol event");
            if event == "SHUTDOWN" {
                let reason = message["data"]["reason"].as_str().map(str::to_owned);
                *self.shutdown_reason.lock().expect("no caller panics") = reason;
            }
            let _ = events.send(message);
        }
    }
}

impl Shared {
    /// StratoVirt answers some questions without their id, the negotiation and what it does not understand: then it is
    /// clear only who asked when nobody else waits.
    fn who_asked(&self, id: &Value) -> Option<oneshot::Sender<Answer>> {
        let mut waiting = self.waiting.lock().expect("no caller panics");
        let waiting = waiting.as_mut()?;
        let id = match id.as_str() {
            Some(id) => id.parse().ok()?,
            None if waiting.len() == 1 => *waiting.keys().next()?,
            None => return None,
        };
        waiting.remove(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A QEMU that says `lines` and then hears what it is told, or hangs up.
    fn qemu(lines: &[&str]) -> (Qmp, StdUnixStream) {
        use std::io::Write;
        let (qmp, far) = Qmp::pair("QEMU").unwrap();
        let mut far = StdUnixStream::from(far);
        lines.iter().for_each(|line| writeln!(far, "{line}").unwrap());
        (qmp, far)
    }

    #[tokio::test]
    async fn an_answer_finds_its_question_between_events() {
        let (qmp, _far) = qemu(&[
            r#"{"QMP": {}}"#,
            r#"{"event": "STOP", "data": {}}"#,
            r#"{"return": {"status": "running"}, "id": "1"}"#,
        ]);
        // Not yet read: the reader runs when this test waits.
        assert_eq!(qmp.execute("query-status", json!({})).await.unwrap()["status"], "running");
    }

    #[tokio::test]
    async fn an_answer_without_an_id_is_that_to_the_only_question() {
        use std::io::{BufRead, BufReader, Write};
        let (qmp, mut far) = qemu(&[r#"{"QMP": {}}"#]);
        let questions = BufReader::new(far.try_clone().unwrap()).lines();
        let answers = [r#"{"return": {}}"#, r#"{"error": {"desc": "unknown field"}}"#];
        let fake = std::thread::spawn(move || {
            questions.zip(answers).for_each(|(_, answer)| writeln!(far, "{answer}").unwrap());
        });
        qmp.negotiate().await.unwrap();
        assert_eq!(qmp.execute("cont", json!({})).await.unwrap_err().to_string(), "QEMU's cont: unknown field");
        drop(qmp);
        fake.join().unwrap();
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_qemus_words() {
        let (qmp, _far) =
            qemu(&[r#"{"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}, "id": "1"}"#]);
        let error = qmp.ask("device_del", json!({ "id": "x" })).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU's device_del: Device 'x' not found");
        assert!(matches!(error, Failure::Refused { class, .. } if class == DEVICE_NOT_FOUND));
    }

    #[tokio::test]
    async fn a_descriptor_goes_along_with_its_name() {
        let (qmp, far) = qemu(&[r#"{"return": {}, "id": "1"}"#]);
        qmp.give("tap", io::pipe().unwrap().1.into()).await.unwrap();
        let mut line = [0; 256];
        let (count, descriptors) = crate::receive::receive(&far, &mut line).unwrap();
        let command: Value = serde_json::from_slice(&line[..count]).unwrap();
        assert_eq!((&command["execute"], &command["arguments"]["fdname"]), (&json!("getfd"), &json!("tap")));
        assert_eq!(descriptors.len(), 1);
    }

    #[tokio::test]
    async fn a_qemu_that_hangs_up_answers_every_question() {
        let (qmp, far) = qemu(&[]);
        drop(far);
        assert_eq!(qmp.execute("cont", json!({})).await.unwrap_err().to_string(), "QEMU's cont: QEMU has ended");
    }

    #[tokio::test]
    async fn a_qemu_that_hangs_up_ends_every_wait_for_an_event() {
        let (qmp, far) = qemu(&[r#"{"event": "STOP"}"#]);
        let mut events = qmp.events();
        drop(far);
        let waited = qmp.next(&mut events, &["RESUME"]).await.unwrap_err();
        assert_eq!(waited.to_string(), "QEMU has ended");
        let too_late = qmp.next(&mut qmp.events(), &["RESUME"]).await.unwrap_err();
        assert_eq!(too_late.to_string(), "QEMU has ended");
    }

    #[tokio::test]
    async fn who_may_have_missed_an_event_is_woken() {
        let event = r#"{"event": "STOP"}"#;
        let mut lines = vec![event; EVENTS + 1];
        lines.push(r#"{"return": {}, "id": "1"}"#);
        let (qmp, _far) = qemu(&lines);
        let mut events = qmp.events();
        qmp.execute("cont", json!({})).await.unwrap();
        qmp.next(&mut events, &["RESUME"]).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_no_json_is_passed_over() {
        let (qmp, _far) = qemu(&["]]]", "", r#"{"id": "7"}"#, r#"{"return": {}, "id": "1"}"#]);
        assert!(qmp.execute("cont", json!({})).await.is_ok());
    }

    #[tokio::test]
    async fn the_last_shutdown_reason_is_kept() {
        let (qmp, _far) = qemu(&[
            r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#,
            r#"{"return": {}, "id": "1"}"#,
        ]);
        qmp.execute("cont", json!({})).await.unwrap();
        assert_eq!(qmp.shutdown_reason().as_deref(), Some("guest-reset"));
    }
}
