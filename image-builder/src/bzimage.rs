//! Takes the uncompressed kernel (an ELF file) out of a bzImage. A VMM that enters it directly skips the kernel's own
//! decompressor. Not a boot loader: only the fields that locate the payload are read.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header"; `lib/decompress_unlz4.c`.

use std::io::{Cursor, Read, Seek, SeekFrom, Write};

use crate::error::{Error, Result};
use crate::tool::Tool;

const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// `payload_offset` exists from this boot protocol on.
const PAYLOAD_PROTOCOL: u16 = 0x208;

/// Largest block of an LZ4 legacy frame, uncompressed (`LZ4_DEFAULT_UNCOMPRESSED_CHUNK_SIZE`), in bytes.
const LZ4_BLOCK: usize = 8 << 20;

/// More than any kernel holds, in bytes.
const MAX_KERNEL: usize = 512 << 20;

/// The uncompressed kernel in a bzImage; `name` is for messages.
pub fn extract_vmlinux(name: &str, image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(name, image)?;
    let kernel = decompress(name, payload)?;
    if !kernel.starts_with(b"\x7fELF") {
        return Err(Error::malformed(name, "its payload is not an ELF file"));
    }
    Ok(kernel)
}

/// The compressed payload, whose last four bytes are its uncompressed size.
fn payload<'a>(name: &str, image: &'a [u8]) -> Result<&'a [u8]> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") {
        return Err(Error::malformed(name, "it is not a bzImage (no boot header at 0x202)"));
    }
    let word = |offset: usize| -> Option<usize> {
        Some(u32::from_le_bytes(image.get(offset..offset + 4)?.try_into().ok()?) as usize)
    };
    let truncated = || Error::malformed(name, "it is truncated");
    let protocol = word(PROTOCOL_VERSION).ok_or_else(truncated)? as u16;
    if protocol < PAYLOAD_PROTOCOL {
        return Err(Error::malformed(
            name,
            format!("its boot protocol {protocol:#x} is older than 0x208 (Linux 2.6.26)"),
        ));
    }
    let sectors = match image[SETUP_SECTS] {
        // The boot protocol's meaning of 0.
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET).ok_or_else(truncated)?;
    let length = word(PAYLOAD_LENGTH).ok_or_else(truncated)?;
    start.checked_add(length).and_then(|end| image.get(start..end)).ok_or_else(truncated)
}

fn decompress(name: &str, payload: &[u8]) -> Result<Vec<u8>> {
    let corrupt =
        |method: &str, reason: String| Error::malformed(name, format!("its {method} payload is corrupt: {reason}"));
    let Some((data, size)) = payload.split_last_chunk::<4>() else {
        return Err(Error::malformed(name, "its payload is empty"));
    };
    let size = u32::from_le_bytes(*size) as usize;
    if size > MAX_KERNEL {
        return Err(Error::malformed(name, format!("its payload claims to unpack to {size} bytes")));
    }
    let kernel = match data {
        [0x02, 0x21, 0x4c, 0x18, ..] => unlz4(data, size).map_err(|reason| corrupt("lz4", reason))?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => unzstd(data, size).map_err(|error| corrupt("zstd", error.to_string()))?,
        [0x1f, 0x8b, ..] => filter("gzip", name, data)?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => filter("xz", name, data)?,
        [0x7f, b'E', b'L', b'F', ..] => payload.to_vec(),
        other => {
            let start = other.iter().take(6).map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
            let reason = format!(
                "its compression is unknown (payload starts with {start}; accepted: lz4, zstd, gzip, xz, none)"
            );
            return Err(Error::malformed(name, reason));
        }
    };
    Ok(kernel)
}

/// LZ4's legacy frame: a magic number, then blocks with their compressed size before them.
fn unlz4(data: &[u8], size: usize) -> std::result::Result<Vec<u8>, String> {
    let mut kernel = Vec::with_capacity(size);
    let mut rest = &data[4..];
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block = tail.get(..length).ok_or_else(|| "a block is truncated".to_owned())?;
        let unpacked = lz4_flex::block::decompress(block, LZ4_BLOCK).map_err(|error| error.to_string())?;
        kernel.extend_from_slice(&unpacked);
        if kernel.len() > size {
            return Err(format!("it unpacks to more than the {size} bytes it claims"));
        }
        rest = &tail[length..];
    }
    match kernel.len() {
        found if found == size => Ok(kernel),
        found => Err(format!("it unpacks to {found} bytes instead of {size}")),
    }
}

fn unzstd(data: &[u8], size: usize) -> std::io::Result<Vec<u8>> {
    let mut kernel = Vec::with_capacity(size);
    zstd::Decoder::new(Cursor::new(data))?.single_frame().take(MAX_KERNEL as u64).read_to_end(&mut kernel)?;
    Ok(kernel)
}

/// Decompresses with the program of that name.
pub fn filter(program: &str, name: &str, data: &[u8]) -> Result<Vec<u8>> {
    let purpose = format!("decompress {name}");
    let exchange = || -> std::io::Result<(std::fs::File, std::fs::File)> {
        let mut input = tempfile::tempfile()?;
        input.write_all(data)?;
        input.seek(SeekFrom::Start(0))?;
        Ok((input, tempfile::tempfile()?))
    };
    let temporary = std::env::temp_dir();
    let (input, mut output) = exchange().map_err(Error::file("write", &temporary))?;
    let writer = output.try_clone().map_err(Error::file("write", &temporary))?;
    Tool::new(program, purpose).args(["--decompress", "--stdout"]).stdin(input).stdout(writer).run()?;
    let mut unpacked = Vec::new();
    output.seek(SeekFrom::Start(0)).map_err(Error::file("read", &temporary))?;
    output.read_to_end(&mut unpacked).map_err(Error::file("read", &temporary))?;
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage whose payload is `data` followed by `size`.
    fn image(data: &[u8], size: u32) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL_VERSION..PROTOCOL_VERSION + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(data.len() as u32 + 4).to_le_bytes());
        image.extend_from_slice(data);
        image.extend_from_slice(&size.to_le_bytes());
        image
    }

    fn error(image: &[u8]) -> String {
        extract_vmlinux("vmlinuz", image).unwrap_err().to_string()
    }

    /// "\x7fELF" as one literal-only LZ4 block in a legacy frame.
    const LZ4_ELF: &[u8] = b"\x02\x21\x4c\x18\x05\0\0\0\x40\x7fELF";

    #[test]
    fn an_lz4_payload_is_unpacked() {
        assert_eq!(extract_vmlinux("vmlinuz", &image(LZ4_ELF, 4)).unwrap(), b"\x7fELF");
    }

    #[test]
    fn a_zstd_payload_is_unpacked() {
        let data = zstd::encode_all(&b"\x7fELF kernel"[..], 3).unwrap();
        assert_eq!(extract_vmlinux("vmlinuz", &image(&data, 11)).unwrap(), b"\x7fELF kernel");
    }

    #[test]
    fn an_lz4_payload_of_another_size_than_it_claims_is_refused() {
        assert!(error(&image(LZ4_ELF, 5)).contains("4 bytes instead of 5"));
        assert!(error(&image(LZ4_ELF, 3)).contains("more than the 3 bytes"));
    }

    #[test]
    fn an_unknown_compression_is_named_by_its_first_bytes() {
        assert!(error(&image(b"BZh91AY", 4)).contains("starts with 42 5a 68 39 31 41; accepted: lz4"));
    }

    #[test]
    fn a_truncated_image_is_refused() {
        let whole = image(LZ4_ELF, 4);
        assert!(error(&whole[..whole.len() - 1]).contains("truncated"));
        assert!(error(&whole[..0x240]).contains("truncated"));
    }

    #[test]
    fn something_else_than_a_kernel_is_refused() {
        assert!(error(b"#!/bin/sh\n").contains("not a bzImage"));
    }
}
