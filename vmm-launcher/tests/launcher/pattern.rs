//! Bytes that both ends of a test can make: what arrives is checked without being kept anywhere.

use std::{
    io::{self, Read, Write},
    thread,
};

const CHUNK: usize = 1 << 16;

/// An endless sequence without repetition, the same each time (Marsaglia's xorshift).
struct Pattern(u64);

impl Pattern {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self, chunk: &mut [u8; CHUNK]) {
        for bytes in chunk.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            bytes.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

/// Writes `mib` MiB.
pub fn write(to: &mut impl Write, mib: usize) -> io::Result<()> {
    let (mut pattern, mut chunk) = (Pattern::new(), [0; CHUNK]);
    for _ in 0..(mib << 20) / CHUNK {
        pattern.next(&mut chunk);
        to.write_all(&chunk)?;
    }
    to.flush()
}

/// Reads `mib` MiB, all of which must be as [`write`] writes them.
pub fn check(from: &mut impl Read, mib: usize) -> io::Result<()> {
    let (mut pattern, mut wanted, mut read) = (Pattern::new(), [0; CHUNK], [0; CHUNK]);
    for chunk in 0..(mib << 20) / CHUNK {
        pattern.next(&mut wanted);
        from.read_exact(&mut read)?;
        if read != wanted {
            let offset = chunk * CHUNK;
            return Err(io::Error::other(format!("something between byte {offset} and {} differs", offset + CHUNK)));
        }
    }
    Ok(())
}

/// Writes and checks `mib` MiB at the same time.
pub fn exchange(mut to: impl Write + Send, mut from: impl Read, mib: usize) -> io::Result<()> {
    thread::scope(|scope| {
        let written = scope.spawn(move || write(&mut to, mib));
        check(&mut from, mib)?;
        written.join().expect("writing does not panic")
    })
}
