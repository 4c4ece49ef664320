//! One program that runs beside the test: its streams, its terminal, its end.

use std::{
    fs::File,
    io::Write,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::Capture;

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; 128 + signal when a signal ended it.
    pub code: i32,
    /// Standard output; with a terminal, everything that the terminal showed.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
    /// When it was started.
    pub started: Instant,
    /// From start to end.
    pub took: Duration,
    /// From start to the first byte of standard output.
    pub first_output: Option<Duration>,
}

impl Outcome {
    /// Standard output as text.
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// # Errors
    /// When the exit code is not 0.
    pub fn success(self) -> Result<Self> {
        if self.code == 0 { Ok(self) } else { bail!("exit code {}: {}{}", self.code, self.stderr, self.stdout_text()) }
    }
}

/// A running program. Ends with the value at the latest.
#[derive(Debug)]
pub struct Session {
    child: Child,
    started: Instant,
    input: Option<File>,
    terminal: Option<OwnedFd>,
    stdout: Arc<Capture>,
    stderr: Arc<Capture>,
}

impl Session {
    /// Starts `command` with a pipe for each of its three streams.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = spawn(&mut command)?;
        let stdout = child.stdout.take().map_or_else(Capture::empty, Capture::of);
        let stderr = child.stderr.take().map_or_else(Capture::empty, Capture::of);
        let input = child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        Ok(Self { child, started, input, terminal: None, stdout, stderr })
    }

    /// Starts `command` with a terminal of `rows` and `columns` as all of its three streams.
    ///
    /// # Errors
    /// When there is no terminal to be had, or the program cannot be executed.
    pub fn start_on_terminal(mut command: Command, rows: u16, columns: u16) -> Result<Self> {
        let terminal =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context("open a terminal")?;
        grantpt(&terminal).and_then(|()| unlockpt(&terminal)).context("unlock the terminal")?;
        let name = ptsname(&terminal, Vec::new()).context("name the terminal")?;
        let name = name.to_str().context("name the terminal")?;
        tcsetwinsize(&terminal, size(rows, columns)).context("size the terminal")?;
        let side = File::options().read(true).write(true).open(name).with_context(|| format!("open {name}"))?;
        command.stdin(side.try_clone()?).stdout(side.try_clone()?).stderr(side);

        let started = Instant::now();
        let child = spawn(&mut command)?;
        // The command holds the other side open; with it the terminal would never end.
        drop(command);
        let stdout = Capture::of(File::from(terminal.try_clone()?));
        let input = Some(File::from(terminal.try_clone()?));
        Ok(Self { child, started, input, terminal: Some(terminal), stdout, stderr: Capture::empty() })
    }

    /// The program's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Standard output so far, or the terminal's.
    pub fn stdout(&self) -> &Capture {
        &self.stdout
    }

    /// Standard error so far.
    pub fn stderr(&self) -> &Capture {
        &self.stderr
    }

    /// Waits until standard output contains `text`.
    ///
    /// # Errors
    /// When it ends or `limit` passes without; the error shows both streams.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<String> {
        self.stdout.wait_for(text, limit).with_context(|| format!("standard error: {}", self.stderr.text()))
    }

    /// Types `text`.
    ///
    /// # Errors
    /// When the program no longer reads.
    pub fn write(&mut self, text: &[u8]) -> Result<()> {
        let input = self.input.as_mut().context("standard input is closed")?;
        input.write_all(text).context("write to standard input")
    }

    /// Writes all of `bytes` in the background and closes standard input after them.
    pub fn feed(&mut self, bytes: Vec<u8>) {
        if let Some(mut input) = self.input.take() {
            // A program may end without reading its input; what it made of it is for the test to judge.
            thread::spawn(move || input.write_all(&bytes).ok());
        }
    }

    /// Closes standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Gives the terminal a new size and tells the program.
    ///
    /// # Errors
    /// When the program has no terminal or has ended.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let terminal = self.terminal.as_ref().context("the program has no terminal")?;
        tcsetwinsize(terminal, size(rows, columns)).context("size the terminal")?;
        // The kernel tells only the terminal's own session; ctr lives in the test's.
        self.signal(Signal::WINCH)
    }

    /// Sends `signal` to the program.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(pid_of(&self.child)?, signal).context("signal the program")
    }

    /// Waits for the end of the program and of its streams.
    ///
    /// # Errors
    /// When `limit` passes first: the program is then killed, and the error shows what it had said.
    pub fn wait(mut self, limit: Duration) -> Result<Outcome> {
        self.input = None;
        let ended = wait_for_exit(&self.child, limit)?;
        let took = self.started.elapsed();
        if !ended {
            self.child.kill().ok();
            self.child.wait().ok();
            bail!("still running after {limit:?}; stdout: {}; stderr: {}", self.stdout.text(), self.stderr.text());
        }
        let status = self.child.wait().context("wait for the program")?;
        let rest = limit.saturating_sub(took);
        self.stdout.wait_for_end(rest).context("standard output stays open after the program's end")?;
        self.stderr.wait_for_end(rest).context("standard error stays open after the program's end")?;
        Ok(Outcome {
            code: code(status),
            stdout: self.stdout.bytes(),
            stderr: self.stderr.text(),
            started: self.started,
            took,
            first_output: self.stdout.first_byte().map(|at| at - self.started),
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Has no effect on a program that has been waited for.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Whether `child` ended within `limit`. Leaves its status to be collected.
pub(crate) fn wait_for_exit(child: &Child, limit: Duration) -> Result<bool> {
    let pidfd = pidfd_open(pid_of(child)?, PidfdFlags::empty()).context("open the program's pidfd")?;
    let limit = Timespec::try_from(limit).context("deadline out of range")?;
    let mut watched = [PollFd::new(&pidfd, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut watched, Some(&limit))).context("wait for the program")?;
    Ok(ready > 0)
}

fn spawn(command: &mut Command) -> Result<Child> {
    command.spawn().with_context(|| format!("execute {}", command.get_program().display()))
}

fn pid_of(child: &Child) -> Result<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("process id out of range")
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn an_outcome_keeps_both_streams_and_the_code() {
        let outcome = Session::start(sh("echo out; echo err >&2; exit 7")).unwrap().wait(LIMIT).unwrap();
        assert_eq!((outcome.code, outcome.stdout_text().as_str(), outcome.stderr.as_str()), (7, "out\n", "err\n"));
    }

    #[test]
    fn a_signal_counts_as_128_and_its_number() {
        let outcome = Session::start(sh("kill -KILL $$")).unwrap().wait(LIMIT).unwrap();
        assert_eq!(outcome.code, 137);
    }

    #[test]
    fn a_program_that_outstays_its_limit_is_killed_and_its_words_are_kept() {
        let session = Session::start(sh("echo begun; exec sleep 60")).unwrap();
        session.wait_for("begun", LIMIT).unwrap();
        let error = session.wait(Duration::from_millis(1)).unwrap_err().to_string();
        assert!(error.contains("begun"), "{error}");
    }

    #[test]
    fn what_is_fed_arrives_and_then_ends() {
        let mut session = Session::start(sh("cat")).unwrap();
        session.feed(b"all of it".to_vec());
        assert_eq!(session.wait_for("all of it", LIMIT).unwrap(), "all of it");
        assert_eq!(session.wait(LIMIT).unwrap().code, 0);
    }

    #[test]
    fn a_terminal_has_the_size_that_it_was_given() {
        let session = Session::start_on_terminal(sh("stty size"), 33, 77).unwrap();
        assert_eq!(session.wait(LIMIT).unwrap().stdout_text().trim(), "33 77");
    }
}
