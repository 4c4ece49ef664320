//! The command: its streams are carried over the port, and nothing that it has started outlives it.

use std::{
    io::{Read, Write},
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use caisson_test_host::{Frame, Job, Verdict};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, wait, waitpid},
    },
    unistd::Pid,
};

use crate::port::Port;

const ENVIRONMENT: [(&str, &str); 4] = [
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("LANG", "C.UTF-8"),
    ("TERM", "dumb"),
];
const CHUNK: usize = 64 * 1024;

/// Executes the job's command and waits for its end and for the end of its output.
pub fn run(job: &Job, port: &Port) -> Result<Verdict> {
    let (program, arguments) = job.command.split_first().context("the job has no command")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(&job.directory).env_clear();
    command.envs(ENVIRONMENT).envs(job.environment.iter().map(|(name, value)| (name, value)));
    command.stdin(if job.stdin { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ok(Err(format!("execute {program} in {}: {error}", job.directory.display()))),
    };
    let pumps = [
        child.stdout.take().map(|stream| send(stream, Frame::Stdout, port)),
        child.stderr.take().map(|stream| send(stream, Frame::Stderr, port)),
    ];
    if let Some(input) = child.stdin.take() {
        let port = port.clone();
        thread::spawn(move || receive(input, &port));
    }
    let code = wait_for(&child)?;
    end_all_others()?;
    for pump in pumps.into_iter().flatten() {
        pump.join().ok();
    }
    Ok(Ok(code))
}

/// Carries a stream to the host until it ends.
fn send(mut stream: impl Read + Send + 'static, frame: fn(Vec<u8>) -> Frame, port: &Port) -> JoinHandle<()> {
    let port = port.clone();
    thread::spawn(move || {
        let mut chunk = vec![0; CHUNK];
        while let Ok(length @ 1..) = stream.read(&mut chunk) {
            if port.send(&frame(chunk[..length].to_vec())).is_err() {
                return;
            }
        }
    })
}

/// Carries the host's input to the command until either ends.
fn receive(mut input: impl Write, port: &Port) {
    while let Ok(Frame::Stdin(bytes)) = port.receive() {
        if bytes.is_empty() || input.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Collects every process that ends, as a first process must, until it is the command.
fn wait_for(child: &Child) -> Result<u8> {
    let command = Pid::from_raw(child.id().cast_signed());
    loop {
        match wait().context("wait for the command")? {
            WaitStatus::Exited(pid, code) if pid == command => return Ok(code as u8),
            WaitStatus::Signaled(pid, signal, _) if pid == command => return Ok(128 + signal as u8),
            _ => {}
        }
    }
}

fn end_all_others() -> Result<()> {
    match kill(Pid::from_raw(-1), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => return Err(error).context("end what the command has started"),
    }
    while waitpid(None, None).is_ok() {}
    Ok(())
}
