//! `caisson sandbox console`: a shell in the guest itself.

use std::{io, os::unix::net::UnixStream, thread};

use anyhow::Context;
use caisson_protocol::sandbox::ConsoleRequest;

use super::{
    client::{Shim, deadline, told},
    json_lines::JsonLines,
    raw_terminal::{self, RawTerminal},
};
use crate::output::Format;

pub(super) async fn run(name: &str, format: Format) -> anyhow::Result<()> {
    let shim = Shim::of(name).await?;
    let (columns, rows) = raw_terminal::size();
    let request = ConsoleRequest { columns: columns.into(), rows: rows.into(), ..Default::default() };
    let answer = shim.sandbox.console(deadline(), &request).await;
    let answer = answer.map_err(told(format!("open a shell in the guest of sandbox {}", shim.record.id)))?;
    let shell = UnixStream::connect(&answer.socket).with_context(|| format!("connect to {}", answer.socket))?;
    // For a program the terminal stays as it is: lines are typed, and objects come.
    let terminal = format == Format::Text && raw_terminal::is_terminal();
    if terminal {
        eprintln!("caisson: a shell in the guest; `exit` or Ctrl-D leaves it");
    }
    let raw = if terminal { RawTerminal::enter() } else { None };
    let outcome = match format {
        Format::Text => join(shell, terminal, &mut io::stdout().lock()),
        Format::Json => join(shell, terminal, &mut JsonLines::new(io::stdout().lock())),
    };
    drop(raw);
    outcome.context("talk to the shell")
}

/// Until the shell ends. A read from a terminal cannot be interrupted: the process's end ends it.
fn join(shell: UnixStream, terminal: bool, out: &mut impl io::Write) -> io::Result<()> {
    let mut typed = shell.try_clone()?;
    thread::spawn(move || {
        let mut input = io::stdin().lock();
        if io::copy(&mut input, &mut typed).is_ok() && !terminal {
            // A script has been typed in whole. The shell ends by itself: hanging up would lose what it still says.
            let _ = io::Write::write_all(&mut typed, END_OF_INPUT);
        }
    });
    let mut shown = shell;
    match io::copy(&mut shown, out) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(()),
    }
}

/// A shell takes this for the end however early it is typed.
const END_OF_INPUT: &[u8] = b"\nexit\n";
