//! What a guest wrote, made harmless for the terminal of whoever reads it: control characters are shown, not obeyed.

use std::io::{self, Write};

/// Passes text on, with control characters as `^[` and the like; line ends and tabs stay.
pub(crate) struct Harmless<W> {
    out: W,
    last: u8,
}

/// Begins the UTF-8 form of U+0080 to U+009F, which terminals obey too.
const C1_LEAD: u8 = 0xc2;

impl<W: Write> Harmless<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, last: 0 }
    }
}

impl<W: Write> Write for Harmless<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut shown = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match byte {
                b'\n' | b'\r' | b'\t' => shown.push(byte),
                ..0x20 | 0x7f => shown.extend([b'^', byte ^ 0x40]),
                // Its second half decides.
                C1_LEAD => {}
                0x80..0xa0 if self.last == C1_LEAD => shown.extend([b'^', byte - 0x40]),
                _ if self.last == C1_LEAD => shown.extend([C1_LEAD, byte]),
                _ => shown.push(byte),
            }
            self.last = byte;
        }
        self.out.write_all(&shown)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(chunks: &[&[u8]]) -> String {
        let mut out = Vec::new();
        let mut harmless = Harmless::new(&mut out);
        chunks.iter().for_each(|chunk| harmless.write_all(chunk).unwrap());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_escape_sequence_is_shown() {
        assert_eq!(shown(&[b"\x1b]0;owned\x07"]), "^[]0;owned^G");
    }

    #[test]
    fn lines_and_letters_stay() {
        assert_eq!(shown(&["a\tb\r\n\u{e4}\u{a9}\u{20ac}".as_bytes()]), "a\tb\r\n\u{e4}\u{a9}\u{20ac}");
    }

    #[test]
    fn a_control_character_of_two_bytes_is_shown_although_it_comes_in_pieces() {
        assert_eq!(shown(&[b"a\xc2", b"\x9bb"]), "a^[b");
    }
}
