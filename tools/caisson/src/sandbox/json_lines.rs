//! What comes out of a guest, for programs: one JSON object for each line.

use std::io::{self, Write};

use serde::Serialize;

/// A line is cut here, so that a guest that never ends one does not fill our memory; in bytes.
const MAX_LINE: usize = 64 << 10;

/// Passes each whole line on as `{"line":"…"}`, or `{"stream":"…","line":"…"}`; what is not UTF-8 is replaced.
pub(super) struct JsonLines<W: Write> {
    out: W,
    stream: Option<&'static str>,
    line: Vec<u8>,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<&'static str>,
    line: &'a str,
}

impl<W: Write> JsonLines<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, stream: None, line: Vec::new() }
    }

    /// For one of several streams that share `out`: none cuts into another's line.
    pub(super) fn of_stream(stream: &'static str, out: W) -> Self {
        Self { out, stream: Some(stream), line: Vec::new() }
    }

    fn end_line(&mut self) -> io::Result<()> {
        let line = String::from_utf8_lossy(&self.line);
        let line = Line { stream: self.stream, line: line.trim_end_matches('\r') };
        let object = serde_json::to_string(&line)? + "\n";
        self.line.clear();
        self.out.write_all(object.as_bytes())
    }
}

impl<W: Write> Write for JsonLines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() == MAX_LINE {
                self.end_line()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<W: Write> Drop for JsonLines<W> {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            // The reader has gone: nobody misses the rest.
            let _ = self.end_line();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]]) -> String {
        let mut out = Vec::new();
        let mut lines = JsonLines::new(&mut out);
        chunks.iter().for_each(|chunk| lines.write_all(chunk).unwrap());
        drop(lines);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_line_that_comes_in_pieces_is_one_object() {
        assert_eq!(lines(&[b"a\"b", b"c\r\nd"]), "{\"line\":\"a\\\"bc\"}\n{\"line\":\"d\"}\n");
    }

    #[test]
    fn each_line_says_of_which_stream_it_is() {
        let mut out = Vec::new();
        JsonLines::of_stream("stderr", &mut out).write_all(b"oops").unwrap();
        assert_eq!(out, b"{\"stream\":\"stderr\",\"line\":\"oops\"}\n");
    }

    #[test]
    fn a_line_without_end_is_cut() {
        assert_eq!(lines(&[&vec![b'x'; MAX_LINE + 1]]).lines().count(), 2);
    }
}
