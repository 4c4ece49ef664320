//! A disk image on the host, opened for one device: a raw file or a block device, checked and locked.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{fd::AsFd, unix::fs::FileTypeExt},
    path::Path,
    sync::Arc,
};

use caisson_vmm_launcher::{Error, Result};
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{ioctl_blkpbszget, ioctl_blksszget};

/// virtio's unit of sizes and places on a disk, in bytes (virtio 1.2 §5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// The physical block size that is told for a file, in bytes: a page of the host's page cache.
const FILE_BLOCK_BYTES: u32 = 4096;

/// An open image. It is locked until it is dropped.
#[derive(Debug)]
pub struct Image {
    /// Open for reading, and for writing unless the image is read-only.
    pub file: Arc<File>,
    /// In bytes, when it was opened.
    pub len: u64,
    /// Whether it was opened for reading only.
    pub is_read_only: bool,
    /// The smallest unit that can be addressed, in bytes; a power of two, at least a sector.
    pub logical_block_bytes: u32,
    /// The smallest unit that is written without reading it first, in bytes; a power of two, at least the logical block.
    pub physical_block_bytes: u32,
}

impl Image {
    /// Opens and locks the image at `path`, which is `what` to the VM: "disk".
    ///
    /// # Errors
    /// It cannot be opened, is neither a file nor a block device, is empty or not a whole number of sectors, or another
    /// virtual machine uses it in a way that does not go with this.
    pub fn open(what: &'static str, path: &str, is_read_only: bool) -> Result<Self> {
        let refused = |source| Error::File { what, path: path.into(), source };
        let kind = fs::metadata(Path::new(path)).map_err(refused)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Invalid(format!("the {what} {path} is neither a file nor a block device")));
        }
        let mut file = OpenOptions::new().read(true).write(!is_read_only).open(path).map_err(refused)?;
        let len = file.seek(SeekFrom::End(0)).map_err(refused)?;
        if len == 0 {
            return Err(Error::Invalid(format!("the {what} {path} is empty")));
        }
        if !len.is_multiple_of(SECTOR_BYTES) {
            return Err(Error::Invalid(format!(
                "the {what} {path} has {len} bytes, which is not a multiple of {SECTOR_BYTES}"
            )));
        }
        lock(what, path, &file, is_read_only)?;
        let (logical_block_bytes, physical_block_bytes) = if kind.is_block_device() {
            let logical = ioctl_blksszget(&file).map_err(|error| refused(error.into()))?;
            (logical, ioctl_blkpbszget(&file).map_or(logical, |physical| physical.max(logical)))
        } else {
            (SECTOR_BYTES as u32, FILE_BLOCK_BYTES)
        };
        Ok(Self { file: Arc::new(file), len, is_read_only, logical_block_bytes, physical_block_bytes })
    }
}

/// Bytes of a file that stand for what its users do, by QEMU's convention (`block/file-posix.c`), so that QEMU's virtual
/// machines and ours respect each other. Who does it holds a read lock on the byte; whom it would harm looks for the lock.
const READS: i64 = 100;
const WRITES: i64 = 101;
const FORBIDS_READING: i64 = 200;
const FORBIDS_WRITING: i64 = 201;

/// Locks `file`: any number of readers, or one writer.
fn lock(what: &str, path: &str, file: &File, is_read_only: bool) -> Result<()> {
    let (does, looks_for): (&[i64], &[i64]) = if is_read_only {
        (&[READS, FORBIDS_WRITING], &[WRITES, FORBIDS_READING])
    } else {
        (&[READS, WRITES, FORBIDS_WRITING], &[WRITES, FORBIDS_READING, FORBIDS_WRITING])
    };
    let busy = || {
        let reason = if is_read_only { "in use by another virtual machine that writes to it" } else { "in use" };
        let remedy = if is_read_only { "" } else { "; only one virtual machine can use a disk that it writes to" };
        Error::Invalid(format!("the {what} {path} is {reason}{remedy}"))
    };
    // All locks are taken before any is looked for, so that of two who start at once at least one finds the other.
    for &byte in does {
        match take(file, byte) {
            Ok(()) => {}
            // Another program's write lock, over all of the file.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(busy()),
            // A file system that has no locks.
            Err(_) => return Ok(()),
        }
    }
    if looks_for.iter().any(|&byte| is_taken(file, byte)) { Err(busy()) } else { Ok(()) }
}

fn take(file: &File, byte: i64) -> io::Result<()> {
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte)))?;
    Ok(())
}

fn is_taken(file: &File, byte: i64) -> bool {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
}

fn byte_lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use tempfile::NamedTempFile;

    use super::*;

    fn file_of(len: u64) -> (NamedTempFile, String) {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        (file, path)
    }

    fn sentence(result: Result<Image>) -> String {
        let error = anyhow::Error::from(result.unwrap_err());
        format!("{error:#}")
    }

    #[test]
    fn a_file_is_an_image() {
        let (_file, path) = file_of(1024);
        let image = Image::open("disk", &path, false).unwrap();
        assert_eq!((image.len, image.logical_block_bytes, image.physical_block_bytes), (1024, 512, 4096));
    }

    #[test]
    fn a_file_that_is_missing_is_refused() {
        let error = sentence(Image::open("disk", "/nowhere/disk.img", true));
        assert_eq!(error, "open the disk /nowhere/disk.img: No such file or directory (os error 2)");
    }

    #[test]
    fn a_directory_is_refused() {
        assert_eq!(sentence(Image::open("disk", "/tmp", true)), "the disk /tmp is neither a file nor a block device");
    }

    #[test]
    fn a_character_device_is_refused() {
        let error = sentence(Image::open("disk", "/dev/zero", true));
        assert_eq!(error, "the disk /dev/zero is neither a file nor a block device");
    }

    #[test]
    fn an_empty_file_is_refused() {
        let (_file, path) = file_of(0);
        assert_eq!(sentence(Image::open("disk", &path, true)), format!("the disk {path} is empty"));
    }

    #[test]
    fn half_a_sector_is_refused() {
        let (_file, path) = file_of(768);
        let error = sentence(Image::open("disk", &path, true));
        assert_eq!(error, format!("the disk {path} has 768 bytes, which is not a multiple of 512"));
    }

    #[test]
    fn readers_share_an_image() {
        let (_file, path) = file_of(512);
        let _first = Image::open("disk", &path, true).unwrap();
        Image::open("disk", &path, true).unwrap();
    }

    #[test]
    fn a_writer_is_alone() {
        let (_file, path) = file_of(512);
        let writer = Image::open("disk", &path, false).unwrap();
        let busy = format!("the disk {path} is in use");
        assert_eq!(
            sentence(Image::open("disk", &path, true)),
            format!("{busy} by another virtual machine that writes to it")
        );
        let alone = format!("{busy}; only one virtual machine can use a disk that it writes to");
        assert_eq!(sentence(Image::open("disk", &path, false)), alone);
        drop(writer);
        let _reader = Image::open("disk", &path, true).unwrap();
        assert_eq!(sentence(Image::open("disk", &path, false)), alone);
    }

    #[test]
    fn a_file_that_another_program_has_locked_is_refused() {
        let (file, path) = file_of(512);
        let whole = libc::flock { l_len: 0, l_start: 0, ..byte_lock(libc::F_WRLCK, 0) };
        fcntl(file.as_file(), FcntlArg::F_OFD_SETLK(&whole)).unwrap();
        sentence(Image::open("disk", &path, true));
    }
}
