//! dm-verity: the hash tree over an image, in veritysetup's format 1 (sha256, 4096-byte blocks, with superblock).
//!
//! ```text
//! hash area:  superblock (1 block) │ top level │ … │ level 1 │ level 0
//! level 0 holds the digests of the data blocks, each level above those of the level below, 128 digests a block;
//! the top level is one block, and its digest is the root hash.
//! ```
//! The salt and the UUID are derived from the data, so that the same image has the same tree.
//! Source: Linux `Documentation/admin-guide/device-mapper/verity.rst`, cryptsetup `lib/verity/verity.c`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::digest::{hex, read_full};
use crate::error::{Error, Result};

/// Size of a data block and of a hash block, in bytes.
pub const BLOCK: usize = 4096;

/// Size of a sha256, in bytes.
const DIGEST: usize = 32;

/// Distinguishes our salts from other digests of the same data.
const SALT_DOMAIN: &[u8] = b"caisson dm-verity salt\0";

/// What is needed to verify an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verity {
    /// Digest of the top of the tree, in hexadecimal.
    pub root_hash: String,
    /// In hexadecimal.
    pub salt: String,
    /// Number of data blocks, of 4096 bytes.
    pub data_blocks: u64,
    /// Where the hash area (its superblock) starts in its file, in bytes.
    pub hash_offset: u64,
}

/// Appends the hash area to an image, padded to whole blocks first.
pub fn append(image: &Path) -> Result<Verity> {
    let mut file = OpenOptions::new().read(true).write(true).open(image).map_err(Error::file("open", image))?;
    let size = file.metadata().map_err(Error::file("read", image))?.len();
    let padded = size.next_multiple_of(BLOCK as u64);
    file.set_len(padded).map_err(Error::file("write", image))?;
    let tree = HashTree::of(&mut file).map_err(Error::file("read", image))?.ok_or_else(|| empty(image))?;
    file.seek(SeekFrom::Start(padded)).map_err(Error::file("write", image))?;
    tree.write(&mut file).map_err(Error::file("write", image))?;
    Ok(tree.verity(padded))
}

/// Writes the hash area of an image to a file of its own; the image is left as it is.
pub fn write_beside(image: &Path, hash_file: &Path) -> Result<Verity> {
    let mut file = File::open(image).map_err(Error::file("read", image))?;
    let size = file.metadata().map_err(Error::file("read", image))?.len();
    if !size.is_multiple_of(BLOCK as u64) {
        return Err(Error::malformed(image.display().to_string(), format!("its size is no multiple of {BLOCK} bytes")));
    }
    let tree = HashTree::of(&mut file).map_err(Error::file("read", image))?.ok_or_else(|| empty(image))?;
    let mut output = File::create(hash_file).map_err(Error::file("create", hash_file))?;
    tree.write(&mut output).map_err(Error::file("write", hash_file))?;
    Ok(tree.verity(0))
}

fn empty(image: &Path) -> Error {
    Error::malformed(image.display().to_string(), "it is empty")
}

struct HashTree {
    salt: [u8; DIGEST],
    data_blocks: u64,
    /// Whole blocks of digests, level 0 first. Empty for a single data block, which is its own top.
    levels: Vec<Vec<u8>>,
    root: [u8; DIGEST],
}

impl HashTree {
    /// Reads the data twice: once for the salt, once for the digests. `None` when there is none.
    fn of(data: &mut (impl Read + Seek)) -> std::io::Result<Option<Self>> {
        let mut hasher = Sha256::new_with_prefix(SALT_DOMAIN);
        data.seek(SeekFrom::Start(0))?;
        for_each_block(data, |block| hasher.update(block))?;
        let salt: [u8; DIGEST] = hasher.finalize().into();

        let mut digests = Vec::new();
        data.seek(SeekFrom::Start(0))?;
        for_each_block(data, |block| digests.extend_from_slice(&salted(&salt, block)))?;
        let data_blocks = (digests.len() / DIGEST) as u64;
        if data_blocks == 0 {
            return Ok(None);
        }
        let mut levels = Vec::new();
        while digests.len() > DIGEST {
            digests.resize(digests.len().next_multiple_of(BLOCK), 0);
            let above = digests.chunks(BLOCK).flat_map(|block| salted(&salt, block)).collect();
            levels.push(std::mem::replace(&mut digests, above));
        }
        let mut root = [0; DIGEST];
        root.copy_from_slice(&digests);
        Ok(Some(Self { salt, data_blocks, levels, root }))
    }

    fn write(&self, output: &mut impl Write) -> std::io::Result<()> {
        output.write_all(&self.superblock())?;
        for level in self.levels.iter().rev() {
            output.write_all(level)?;
        }
        output.flush()
    }

    /// `struct verity_sb` of cryptsetup, in a block of its own.
    fn superblock(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut put = |offset: usize, bytes: &[u8]| block[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, b"verity\0\0");
        put(8, &1_u32.to_le_bytes()); // superblock version
        put(12, &1_u32.to_le_bytes()); // hash type: salt first
        put(16, &self.uuid());
        put(32, b"sha256");
        put(64, &(BLOCK as u32).to_le_bytes());
        put(68, &(BLOCK as u32).to_le_bytes());
        put(72, &self.data_blocks.to_le_bytes());
        put(80, &(DIGEST as u16).to_le_bytes());
        put(88, &self.salt);
        block
    }

    /// A random-like UUID (version 4 by its bits) from the root hash.
    fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.root[..16]);
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }

    fn verity(&self, hash_offset: u64) -> Verity {
        Verity { root_hash: hex(&self.root), salt: hex(&self.salt), data_blocks: self.data_blocks, hash_offset }
    }
}

fn salted(salt: &[u8], block: &[u8]) -> [u8; DIGEST] {
    Sha256::new_with_prefix(salt).chain_update(block).finalize().into()
}

/// Calls `each` with every block of the data.
fn for_each_block(data: &mut impl Read, mut each: impl FnMut(&[u8])) -> std::io::Result<()> {
    let mut chunk = vec![0; 256 * BLOCK];
    loop {
        let filled = read_full(data, &mut chunk)?;
        if filled == 0 {
            return Ok(());
        }
        chunk[..filled].chunks(BLOCK).for_each(&mut each);
    }
}
