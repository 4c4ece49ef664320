//! `caisson sandbox console`: a shell in the guest itself.

use std::{io, os::unix::net::UnixStream, thread};

use anyhow::Context;
use caisson_protocol::sandbox::ConsoleRequest;

use super::{
    client::{Shim, deadline, told},
    raw_terminal::{self, RawTerminal},
};

pub(super) async fn run(name: &str) -> anyhow::Result<()> {
    let shim = Shim::of(name).await?;
    let (columns, rows) = raw_terminal::size();
    let request = ConsoleRequest { columns: columns.into(), rows: rows.into(), ..Default::default() };
    let answer = shim.sandbox.console(deadline(), &request).await;
    let answer = answer.map_err(told(format!("open a shell in the guest of sandbox {}", shim.record.id)))?;
    let shell = UnixStream::connect(&answer.socket).with_context(|| format!("connect to {}", answer.socket))?;
    if raw_terminal::is_terminal() {
        eprintln!("caisson: a shell in the guest; `exit` or Ctrl-D leaves it");
    }
    let raw = RawTerminal::enter();
    let outcome = join(shell);
    drop(raw);
    outcome.context("talk to the shell")
}

/// Until the shell ends. A read from a terminal cannot be interrupted: the process's end ends it.
fn join(shell: UnixStream) -> io::Result<()> {
    let mut typed = shell.try_clone()?;
    thread::spawn(move || {
        let mut input = io::stdin().lock();
        if io::copy(&mut input, &mut typed).is_ok() && !raw_terminal::is_terminal() {
            // A script has been typed in whole. The shell ends by itself: hanging up would lose what it still says.
            let _ = io::Write::write_all(&mut typed, END_OF_INPUT);
        }
    });
    let mut shown = shell;
    match io::copy(&mut shown, &mut io::stdout().lock()) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(()),
    }
}

/// A shell takes this for the end however early it is typed.
const END_OF_INPUT: &[u8] = b"\nexit\n";
