//! `delete`: containerd asks to remove what a shim left that it could not ask itself, most often because it was killed.

use std::{
    io::{self, Write},
    os::fd::AsFd,
    time::SystemTime,
};

use caisson_protocol::{containerd::api::DeleteResponse, paths::SandboxDir};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use protobuf::{Message, MessageField};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{
    Error, Result,
    cli::Flags,
    record::{Record, start_ticks},
    sandbox, share,
};

/// Milliseconds for a launcher that has lost its shim to end its VM and itself.
const END_LIMIT: u16 = 5000;
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
        && let Err(error) = end_launcher(&record)
    {
        eprintln!("end launcher {} of sandbox {}: {error}", record.launcher_pid, record.id);
    }
    sandbox::remove(dir);
}

/// The kernel has told the launcher that its shim is gone, and the launcher ends its VM. Waits for that, and insists.
fn end_launcher(record: &Record) -> io::Result<()> {
    let Some(pid) = Pid::from_raw(record.launcher_pid as i32) else { return Ok(()) };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    // Opened first and compared then: the descriptor stays with this process even if the number is given away.
    if start_ticks(record.launcher_pid) != Some(record.launcher_start_ticks) {
        return Ok(());
    }
    for signal in [Signal::TERM, Signal::KILL] {
        match pidfd_send_signal(&process, signal) {
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            outcome => outcome?,
        }
        let mut wait = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        if poll(&mut wait, PollTimeout::from(END_LIMIT))? == 1 {
            return Ok(());
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "it does not end even by SIGKILL"))
}
