//! How the KVM test host is spoken to: over one virtio-serial port, in frames.
//!
//! ```text
//! host                       guest's first process
//!   ◄──────────── Ready      has found the port
//!   Job ────────────────►    enters its root, executes the command
//!   Stdin … ────────────►
//!   ◄──────── Stdout, Stderr …
//!   ◄──────────── Pulse …    its clock has gone on, however little else there is to say
//!   ◄───────────── Exit      everything that was started has ended
//! ```

mod frame;

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

pub use frame::Frame;

/// The port's name.
pub const PORT: &str = "caisson.control";
/// Serial number of the disk with the system, read-only.
pub const SYSTEM_DISK: &str = "system";
/// Serial number of the disk that everything is written to, an empty ext4.
pub const SCRATCH_DISK: &str = "scratch";
/// Serial number of a disk like the system's that the machine itself does not use: a device to give away, by VFIO.
pub const SPARE_DISK: &str = "spare";
/// The virtio-fs tag of the machine's folders.
pub const SHARE: &str = "machine";

/// How far its clock goes between two pulses.
pub const PULSE: Duration = Duration::from_secs(2);

/// What the test host is booted for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Where it is executed.
    pub directory: PathBuf,
    /// Added to the environment.
    pub environment: Vec<(String, String)>,
    /// Folders of the machine, found at the same paths in the test host. What is written to them is lost at its end.
    pub shared: Vec<PathBuf>,
    /// Whether standard input will come; it is empty otherwise.
    pub stdin: bool,
}

/// How the command ended: its exit code (128 + signal), or why it could not be executed.
pub type Verdict = Result<u8, String>;
