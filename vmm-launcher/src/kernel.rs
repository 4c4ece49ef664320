//! What a kernel file is, told by its first bytes, before a hypervisor says it in its own words or not at all.

use std::{fs::File, io::Read, os::unix::fs::FileExt, path::Path};

use crate::{Error, Result};

/// A kernel file's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// `arch/x86/boot/bzImage`: a boot sector and "HdrS" at 0x202, `Documentation/arch/x86/boot.rst`.
    BzImage,
    /// `vmlinux`.
    Elf,
}

/// Where caisson's own kernel is as a bzImage: the default of hypervisors that boot no vmlinux.
pub const BZIMAGE: &str = "/usr/share/caisson/bzImage";

/// Looks into `path`.
///
/// # Errors
/// When the file cannot be read or is neither.
pub fn format(path: &Path) -> Result<KernelFormat> {
    let file = |source| Error::File { what: "guest kernel", path: path.to_owned(), source };
    let mut kernel = File::open(path).map_err(file)?;
    let mut magic = [0; 4];
    if kernel.read_exact_at(&mut magic, 0x202).is_ok() && &magic == b"HdrS" {
        return Ok(KernelFormat::BzImage);
    }
    match kernel.read(&mut magic) {
        Ok(4) if &magic == b"\x7fELF" => Ok(KernelFormat::Elf),
        Ok(_) => Err(Error::Invalid(format!(
            "the guest kernel {} is not a Linux kernel: neither a bzImage nor an ELF vmlinux",
            path.display()
        ))),
        Err(error) => Err(file(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format_of(content: &[u8]) -> Result<KernelFormat> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        format(file.path())
    }

    #[test]
    fn a_boot_header_makes_a_bzimage() {
        let mut image = vec![0; 0x202];
        image.extend_from_slice(b"HdrS");
        assert_eq!(format_of(&image).unwrap(), KernelFormat::BzImage);
    }

    #[test]
    fn an_elf_file_is_recognised() {
        assert_eq!(format_of(b"\x7fELF and more").unwrap(), KernelFormat::Elf);
    }

    #[test]
    fn an_empty_file_is_not_a_kernel() {
        assert!(format_of(b"").unwrap_err().to_string().ends_with("neither a bzImage nor an ELF vmlinux"));
    }

    #[test]
    fn a_missing_kernel_is_named() {
        assert_eq!(
            format(Path::new("/nonexistent/k")).unwrap_err().to_string(),
            "open the guest kernel /nonexistent/k"
        );
    }
}
