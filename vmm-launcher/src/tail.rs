//! The end of a stream of bytes from somebody else, kept for people: bounded, and as plain text.

use std::collections::VecDeque;

/// What an error can carry, and what `vmm.proto` promises at most.
pub const TAIL_BYTES: usize = 4096;

/// The last [`TAIL_BYTES`] bytes of a stream.
#[derive(Debug, Default)]
pub struct Tail(VecDeque<u8>);

impl Tail {
    /// Adds to the end, and forgets as much of the beginning as is too much.
    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let excess = (self.0.len() + bytes.len()).saturating_sub(TAIL_BYTES);
        self.0.drain(..excess);
        self.0.extend(bytes);
    }

    /// What is kept, without control characters and terminal sequences, at most [`TAIL_BYTES`] bytes long.
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        let mut text = plain(&String::from_utf8_lossy(&bytes));
        // Replacement characters are longer than what they replace.
        let mut excess = text.len().saturating_sub(TAIL_BYTES);
        while !text.is_char_boundary(excess) {
            excess += 1;
        }
        text.drain(..excess);
        text.trim().to_owned()
    }
}

/// `text` without terminal sequences (ECMA-48 §5.4, `ESC [ … final byte`) and control characters other than newline and tab.
pub(crate) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\u{1b}' if characters.next_if_eq(&'[').is_some() => {
                characters.by_ref().find(|character| ('@'..='~').contains(character));
            }
            '\n' | '\t' => plain.push(character),
            character if character.is_control() => {}
            character => plain.push(character),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail_of(chunks: &[&[u8]]) -> Tail {
        let mut tail = Tail::default();
        chunks.iter().for_each(|chunk| tail.push(chunk));
        tail
    }

    #[test]
    fn only_the_end_of_a_long_stream_is_kept() {
        let tail = tail_of(&[b"start", &[b'x'; TAIL_BYTES - 3], b"end"]);
        assert_eq!(tail.text(), format!("{}end", "x".repeat(TAIL_BYTES - 3)));
    }

    #[test]
    fn one_chunk_longer_than_the_tail_keeps_its_end() {
        let tail = tail_of(&[&[b'x'; 3 * TAIL_BYTES], b"end"]);
        assert_eq!(tail.text().len(), TAIL_BYTES);
        assert!(tail.text().ends_with("xend"));
    }

    #[test]
    fn terminal_sequences_and_control_characters_are_removed() {
        assert_eq!(tail_of(&[b"\x1b[2J\x1b[1;31mred\x07\r\n\x00text\x1b"]).text(), "red\ntext");
    }

    #[test]
    fn bytes_that_are_no_text_never_make_it_longer() {
        assert!(tail_of(&[&[0xff; TAIL_BYTES]]).text().len() <= TAIL_BYTES);
    }
}
