//! Bytes that both ends of a test can make: what arrives is checked without being kept anywhere, and both making and
//! checking them costs next to nothing, because an emulated guest does it too.

use std::{
    io::{self, Read, Write},
    thread,
};

const CHUNK: usize = 1 << 18;
const SECTOR: usize = 512;

/// An endless sequence, the same each time: one chunk of disorder again and again, in which each sector begins with its own
/// number. So a byte that differs is found, and also a sector that is in another's place.
struct Pattern {
    chunk: Vec<u8>,
    sector: u64,
}

impl Pattern {
    /// Disorder: Marsaglia's xorshift.
    fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut chunk = vec![0; CHUNK];
        for bytes in chunk.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.copy_from_slice(&state.to_le_bytes());
        }
        Self { chunk, sector: 0 }
    }

    fn next(&mut self) -> &[u8] {
        for sector in self.chunk.chunks_exact_mut(SECTOR) {
            sector[..8].copy_from_slice(&self.sector.to_le_bytes());
            self.sector += 1;
        }
        &self.chunk
    }
}

/// Writes `mib` MiB.
pub fn write(to: &mut impl Write, mib: usize) -> io::Result<()> {
    let mut pattern = Pattern::new();
    (0..(mib << 20) / CHUNK).try_for_each(|_| to.write_all(pattern.next()))?;
    to.flush()
}

/// Reads `mib` MiB, all of which must be as [`write`] writes them.
pub fn check(from: &mut impl Read, mib: usize) -> io::Result<()> {
    let (mut pattern, mut read) = (Pattern::new(), vec![0; CHUNK]);
    for chunk in 0..(mib << 20) / CHUNK {
        from.read_exact(&mut read)?;
        if read != pattern.next() {
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
