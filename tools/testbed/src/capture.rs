//! A stream that is read to its end in the background, so that a test can wait for what it is about to say.

use std::{
    io::Read,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// Everything that a stream has said so far.
#[derive(Debug, Default)]
pub struct Capture {
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Heard {
    bytes: Vec<u8>,
    /// How many bytes had come, and when.
    arrivals: Vec<(usize, Instant)>,
    ended: bool,
}

/// One line and when its end came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Without the line break.
    pub text: String,
    /// On this process's clock.
    pub at: Instant,
}

impl Capture {
    /// Reads `stream` until it ends. A terminal whose other side is closed ends with an error; that is an end too.
    pub fn of(mut stream: impl Read + Send + 'static) -> Arc<Self> {
        let capture = Arc::new(Self::default());
        let writer = Arc::clone(&capture);
        thread::spawn(move || {
            let mut chunk = vec![0; 64 * 1024];
            while let Ok(length @ 1..) = stream.read(&mut chunk) {
                writer.append(&chunk[..length]);
            }
            writer.lock().ended = true;
            writer.changed.notify_all();
        });
        capture
    }

    /// A stream that says nothing.
    pub fn empty() -> Arc<Self> {
        let capture = Self::default();
        capture.lock().ended = true;
        Arc::new(capture)
    }

    /// What was heard until now.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// The same as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// When the first byte came.
    pub fn first_byte(&self) -> Option<Instant> {
        self.lock().arrivals.first().map(|(_, at)| *at)
    }

    /// Waits until a line contains `needle` and gives that line as far as it has come.
    ///
    /// # Errors
    /// When the stream ends or `limit` passes without it; the error shows what was heard instead.
    pub fn wait_for(&self, needle: &str, limit: Duration) -> Result<String> {
        Ok(self.wait_for_nth(needle, 1, limit)?.text)
    }

    /// Like [`Self::wait_for`], for the `count`th line with `needle`, counted from 1.
    ///
    /// # Errors
    /// As for [`Self::wait_for`].
    pub fn wait_for_nth(&self, needle: &str, count: usize, limit: Duration) -> Result<Line> {
        let mut found = None;
        let heard = self.wait_while(limit, |heard| {
            found = heard.nth_line(needle, count);
            found.is_none() && !heard.ended
        });
        let how_long = if heard.ended { "before the end".to_owned() } else { format!("within {limit:?}") };
        found.with_context(|| format!("\"{needle}\" did not come {how_long}; heard: {}", tail(&heard.bytes)))
    }

    /// Waits until the stream ends.
    ///
    /// # Errors
    /// When `limit` passes first.
    pub fn wait_for_end(&self, limit: Duration) -> Result<()> {
        if self.wait_while(limit, |heard| !heard.ended).ended {
            Ok(())
        } else {
            bail!("the stream did not end within {limit:?}")
        }
    }

    fn append(&self, chunk: &[u8]) {
        let mut heard = self.lock();
        heard.bytes.extend_from_slice(chunk);
        let length = heard.bytes.len();
        heard.arrivals.push((length, Instant::now()));
        self.changed.notify_all();
    }

    fn wait_while(&self, limit: Duration, mut waiting: impl FnMut(&Heard) -> bool) -> MutexGuard<'_, Heard> {
        let guard = self.changed.wait_timeout_while(self.lock(), limit, |heard| waiting(heard));
        guard.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Heard {
    fn nth_line(&self, needle: &str, count: usize) -> Option<Line> {
        let mut end = 0;
        let lines = self.bytes.split_inclusive(|byte| *byte == b'\n').map(|line| {
            end += line.len();
            (String::from_utf8_lossy(line), end)
        });
        let (text, end) = lines.filter(|(text, _)| text.contains(needle)).nth(count - 1)?;
        let (_, at) = self.arrivals.iter().find(|(length, _)| *length >= end)?;
        Some(Line { text: text.trim_end_matches('\n').to_owned(), at: *at })
    }
}

/// The end of a long text, for error messages.
fn tail(bytes: &[u8]) -> String {
    const LIMIT: usize = 4096;
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LIMIT)..]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn the_line_that_was_waited_for_is_given() {
        let capture = Capture::of(&b"one\ntwo words\nthree\n"[..]);
        assert_eq!(capture.wait_for("words", LIMIT).unwrap(), "two words");
    }

    #[test]
    fn the_second_of_two_lines_can_be_waited_for() {
        let capture = Capture::of(&b"x 1\nx 2\n"[..]);
        assert_eq!(capture.wait_for_nth("x", 2, LIMIT).unwrap().text, "x 2");
    }

    #[test]
    fn a_stream_that_ends_without_the_line_is_an_error_that_shows_it() {
        let capture = Capture::of(&b"something else"[..]);
        let error = capture.wait_for("words", LIMIT).unwrap_err().to_string();
        assert!(error.contains("something else"), "{error}");
    }
}
