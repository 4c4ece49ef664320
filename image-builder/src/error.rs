//! The crate's one error type. Every message is one sentence that says what was tried, on what, and what to do.

use std::io;
use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why an artifact could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed (missing file, full disk, permissions).
    #[error("cannot {verb} {path}: {source}")]
    File {
        /// What was tried, as a verb: "read", "write", "create".
        verb: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The recipe holds a key or value that is not accepted.
    #[error("{path}: {message}")]
    Recipe {
        /// The recipe file.
        path: PathBuf,
        /// Line, key and what would be accepted.
        message: String,
    },
    /// A program that is needed is not installed.
    #[error("{program} is needed to {purpose} and is not installed; run: apt-get install {package}")]
    MissingTool {
        /// The program.
        program: String,
        /// What it is needed for.
        purpose: String,
        /// The Debian package that has it.
        package: String,
    },
    /// A program ran and said no.
    #[error("cannot {purpose}: {program} {status}: {words}")]
    Tool {
        /// The program.
        program: String,
        /// What it was run for.
        purpose: String,
        /// "exited with 1", "was killed by signal 9".
        status: String,
        /// The end of what it wrote on standard error.
        words: String,
    },
    /// apt knows no such package.
    #[error("no Debian package {package}; check the name, or run: apt-get update")]
    NoPackage {
        /// As asked for.
        package: String,
    },
    /// A package exists, but not in the version asked for.
    #[error("no version {version} of package {package} in apt's lists; available: {available}")]
    NoVersion {
        /// As asked for.
        package: String,
        /// As asked for.
        version: String,
        /// What apt's lists offer.
        available: String,
    },
    /// What was downloaded is not what the signed package lists promise.
    #[error("package {package} is damaged: its sha256 is {found}, the package list says {expected}")]
    DamagedPackage {
        /// File name.
        package: String,
        /// Digest of the bytes that arrived.
        found: String,
        /// Digest in apt's lists.
        expected: String,
    },
    /// A kernel image or module cannot be understood.
    #[error("{what} is not usable: {reason}")]
    Malformed {
        /// The file, or the part of it.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel has a wanted module neither as a file nor built in.
    #[error(
        "the kernel {kernel} has no module {module}, neither as a file nor built in; correct `modules` under [kernel]"
    )]
    NoModule {
        /// Kernel release.
        kernel: String,
        /// The module asked for.
        module: String,
    },
    /// Modules that need each other cannot be ordered.
    #[error("the kernel modules {modules} depend on each other in a circle")]
    ModuleCircle {
        /// The modules on the circle, in order.
        modules: String,
    },
    /// `make olddefconfig` dropped symbols of the configuration fragment.
    #[error(
        "the kernel source {version} did not accept {symbols} (of {fragment}); a dependency is missing or the symbol was renamed"
    )]
    ConfigDropped {
        /// Version of the source package.
        version: String,
        /// The symbols, as written in the fragment.
        symbols: String,
        /// The fragment's name.
        fragment: String,
    },
    /// The guest agent was not found.
    #[error(
        "no guest agent (looked at {looked_at}); build it with `cargo build --profile guest --target x86_64-unknown-linux-gnu -p caisson-agent`, or name it with --agent PATH"
    )]
    NoAgent {
        /// The places, separated by commas.
        looked_at: String,
    },
    /// The guest agent needs a dynamic linker, which an initrd does not have.
    #[error(
        "{path} is dynamically linked (needs {interpreter}) and cannot be a guest's first process; build it statically: RUSTFLAGS='-C target-feature=+crt-static' cargo build --profile guest --target x86_64-unknown-linux-gnu -p caisson-agent"
    )]
    AgentNotStatic {
        /// The binary.
        path: PathBuf,
        /// Its PT_INTERP.
        interpreter: String,
    },
    /// The combination of choices makes no sense.
    #[error("{0}")]
    Unsupported(String),
}

impl Error {
    /// For `map_err` on file operations.
    pub fn file<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::File { verb, path: path.to_owned(), source }
    }

    /// For images, modules and archives whose content is wrong.
    pub fn malformed(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Malformed { what: what.into(), reason: reason.into() }
    }
}
