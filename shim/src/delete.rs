//! `delete`: containerd asks to remove what a shim left that it could not ask itself, most often because it was killed.

use std::{
    io::{self, Write},
    time::{Duration, SystemTime},
};

use caisson_protocol::{containerd::api::DeleteResponse, paths::SandboxDir, processes::ProcessList};
use protobuf::{Message, MessageField};
use rustix::process::Signal;

use crate::{Error, Result, cli::Flags, record::Record, sandbox, share};

/// For a launcher that has lost its shim to end its VM and itself.
const END_LIMIT: Duration = Duration::from_secs(5);
/// What containerd reports for a task whose shim was killed: 128 + SIGKILL, as with runc.
const KILLED: u32 = 137;

/// Runs with the bundle as working directory.
pub fn delete(flags: &Flags) -> Result<()> {
    let dir = SandboxDir::of(&flags.namespace, &flags.id);
    if dir.path().exists() {
        clean_up(&dir);
    } else if let Ok(bundle) = crate::bundle::Bundle::load(std::path::Path::new("."))
        && let Ok(crate::bundle::Role::PodMember(pod)) = bundle.role()
    {
        let folder = SandboxDir::of(&flags.namespace, &pod).shared().join(flags.id.as_str());
        share::remove(&folder).map_err(Error::host(format!("remove {}", folder.display())))?;
    }
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(SystemTime::now().into()),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().map_err(|error| Error::host("answer containerd")(io::Error::other(error)))?;
    io::stdout().write_all(&bytes).map_err(Error::host("answer containerd"))
}

/// Ends what still serves the sandbox and removes its directory.
pub fn clean_up(dir: &SandboxDir) {
    if let Some(record) = Record::load(dir)
        && let Err(error) = end_processes(dir, &record)
    {
        eprintln!("end launcher {} of sandbox {}: {error}", record.launcher_pid, record.id);
    }
    sandbox::remove(dir);
}

/// The kernel has told the launcher that its shim is gone, and the launcher ends its VM. Waits for that, and insists. A
/// launcher that was killed too could not end its VM.
fn end_processes(dir: &SandboxDir, record: &Record) -> io::Result<()> {
    if !record.launcher().end(Signal::TERM, END_LIMIT)? && !record.launcher().end(Signal::KILL, END_LIMIT)? {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not end even by SIGKILL"));
    }
    ProcessList::in_dir(dir.path()).end_all(END_LIMIT)
}
