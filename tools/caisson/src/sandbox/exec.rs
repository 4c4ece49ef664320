//! `caisson sandbox exec`: one more process in a container, by the same calls that `ctr task exec` leads to.

use std::{
    io::{self, Write},
    path::Path,
    process::{self, ExitCode},
};

use anyhow::{Context, bail};
use caisson_protocol::{
    containerd::{
        api::{
            CloseIORequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest, StartRequest, WaitRequest,
        },
        shim_async::TaskClient,
    },
    no_deadline,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    client::{Shim, deadline, told},
    exec_streams::{Fifos, Flow},
    raw_terminal::{self, RawTerminal},
};
use crate::output::Format;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  caisson sandbox exec web                                   a shell
  caisson sandbox exec web -- cat /proc/meminfo
  caisson sandbox exec --container nginx --user 0 pod -- sh -c 'kill -HUP 1'
  tar c . | caisson sandbox exec web -- tar x -C /data
  caisson sandbox exec web --json -- ls | jq -r 'select(.stream == \"stdout\").line'

The program gets a terminal when it is started from one. With --json it gets none: each line that it writes becomes
{\"stream\":\"stdout\" or \"stderr\",\"line\":…}, and its end {\"exit_code\":…}.")]
pub(crate) struct Arguments {
    /// The container, or the beginning of its id, where the sandbox has several.
    #[arg(short, long, value_name = "ID")]
    container: Option<String>,
    /// The program's user, as numbers: UID or UID:GID; otherwise the container's.
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,
    /// The program's working directory; otherwise the container's.
    #[arg(short = 'w', long, value_name = "DIR")]
    cwd: Option<String>,
    /// An environment variable more.
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The sandbox's id, or the beginning of it.
    sandbox: String,
    /// The program with its arguments; without one, a shell.
    #[arg(last = true, default_values_t = ["sh".to_owned()])]
    command: Vec<String>,
}

/// How containerd names an OCI process in a message.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

pub(super) async fn run(arguments: Arguments, format: Format) -> anyhow::Result<ExitCode> {
    let shim = Shim::of(&arguments.sandbox).await?;
    let container = shim.container(arguments.container.as_deref()).await?;
    let terminal = format == Format::Text && raw_terminal::is_terminal();
    let process = process_in(Path::new(&container.bundle), &arguments, terminal)?;
    let attempt = || format!("execute {} in container {}", arguments.command[0], container.id);

    let fifos = Fifos::make(&shim.dir, terminal).with_context(attempt)?;
    let exec = Exec { task: &shim.task, container: container.id.clone(), id: format!("caisson-{}", process::id()) };
    exec.create(process, &fifos, terminal).await.map_err(told(attempt()))?;
    // The shim has opened its ends: none of ours waits.
    let mut flow = fifos.open(format).with_context(attempt)?;
    let raw = if terminal { RawTerminal::enter() } else { None };
    let ended = exec.attend(&mut flow, terminal).await;
    // It has ended, or could not start: it is not needed any more.
    let deleted = exec.delete().await;
    drop(raw);
    let status = ended.map_err(told(attempt()))?;
    deleted.map_err(told(attempt()))?;
    flow.finish().await.with_context(attempt)?;
    if format == Format::Json {
        writeln!(io::stdout(), "{}", serde_json::json!({ "exit_code": status }))?;
    }
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

/// The container's own first process, changed to what is asked for.
fn process_in(bundle: &Path, arguments: &Arguments, terminal: bool) -> anyhow::Result<Value> {
    let path = bundle.join("config.json");
    let read = || anyhow::Ok(serde_json::from_slice::<Value>(&std::fs::read(&path)?)?);
    let mut spec = read().with_context(|| format!("read the container's configuration {}", path.display()))?;
    let mut process = spec["process"].take();
    if !process.is_object() {
        bail!("the container's configuration {} has no process", path.display());
    }
    process["args"] = arguments.command.clone().into();
    process["terminal"] = terminal.into();
    if let Some(cwd) = &arguments.cwd {
        process["cwd"] = cwd.clone().into();
    }
    if let Some(user) = &arguments.user {
        process["user"] = parse_user(user)?;
    }
    if !process["env"].is_array() {
        process["env"] = Value::Array(Vec::new());
    }
    if let Some(environment) = process["env"].as_array_mut() {
        environment.extend(arguments.env.iter().cloned().map(Value::from));
        if terminal && !environment.iter().any(|entry| entry.as_str().is_some_and(|entry| entry.starts_with("TERM="))) {
            environment.push("TERM=xterm".into());
        }
    }
    Ok(process)
}

fn parse_user(user: &str) -> anyhow::Result<Value> {
    let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
    let number = |text: &str| {
        text.parse::<u32>().with_context(|| format!("--user {user}: \"{}\" is no number", text.escape_debug()))
    };
    Ok(serde_json::json!({ "uid": number(uid)?, "gid": number(gid)? }))
}

/// The process, as the shim knows it.
struct Exec<'a> {
    task: &'a TaskClient,
    container: String,
    id: String,
}

impl Exec<'_> {
    async fn create(&self, process: Value, fifos: &Fifos, terminal: bool) -> ttrpc::Result<()> {
        let mut request = ExecProcessRequest {
            id: self.container.clone(),
            exec_id: self.id.clone(),
            terminal,
            stdin: fifos.stdin(),
            stdout: fifos.stdout(),
            stderr: fifos.stderr(),
            ..Default::default()
        };
        let spec = request.spec.mut_or_insert_default();
        PROCESS_TYPE.clone_into(&mut spec.type_url);
        spec.value = process.to_string().into_bytes();
        self.task.exec(deadline(), &request).await.map(drop)
    }

    /// Starts it and answers its exit code; what happens to this program meanwhile is passed on.
    async fn attend(&self, flow: &mut Flow, terminal: bool) -> ttrpc::Result<u32> {
        let (id, exec_id) = (self.container.clone(), self.id.clone());
        let start = StartRequest { id: id.clone(), exec_id: exec_id.clone(), ..Default::default() };
        self.task.start(deadline(), &start).await?;
        if terminal {
            self.resize().await;
        }
        let wait = WaitRequest { id, exec_id, ..Default::default() };
        let mut end = std::pin::pin!(self.task.wait(no_deadline(), &wait));
        let listen = |kind| signal(kind).map_err(|error| ttrpc::Error::Others(format!("wait for signals: {error}")));
        let mut resized = listen(SignalKind::window_change())?;
        let mut interrupted = listen(SignalKind::interrupt())?;
        let mut terminated = listen(SignalKind::terminate())?;
        loop {
            tokio::select! {
                ended = &mut end => return ended.map(|ended| ended.exit_status),
                () = flow.input_ends() => self.close_stdin().await,
                _ = resized.recv(), if terminal => self.resize().await,
                _ = interrupted.recv() => self.kill(Signal::SIGINT).await,
                _ = terminated.recv() => self.kill(Signal::SIGTERM).await,
            }
        }
    }

    async fn close_stdin(&self) {
        let request =
            CloseIORequest { id: self.container.clone(), exec_id: self.id.clone(), stdin: true, ..Default::default() };
        // It may have ended by itself.
        let _ = self.task.close_io(deadline(), &request).await;
    }

    async fn resize(&self) {
        let (width, height) = raw_terminal::size();
        let request = ResizePtyRequest {
            id: self.container.clone(),
            exec_id: self.id.clone(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        let _ = self.task.resize_pty(deadline(), &request).await;
    }

    async fn kill(&self, signal: Signal) {
        let request = KillRequest {
            id: self.container.clone(),
            exec_id: self.id.clone(),
            signal: signal as u32,
            ..Default::default()
        };
        let _ = self.task.kill(deadline(), &request).await;
    }

    async fn delete(&self) -> ttrpc::Result<()> {
        let request = DeleteRequest { id: self.container.clone(), exec_id: self.id.clone(), ..Default::default() };
        self.task.delete(deadline(), &request).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn arguments(words: &[&str]) -> Arguments {
        Line::parse_from([&["exec"], words].concat()).arguments
    }

    fn bundle(process: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), format!(r#"{{"process":{process}}}"#)).unwrap();
        dir
    }

    #[test]
    fn the_process_is_the_containers_own_with_other_arguments() {
        let bundle = bundle(r#"{"args":["nginx"],"cwd":"/srv","env":["PATH=/bin"],"user":{"uid":5,"gid":6}}"#);
        let process = process_in(bundle.path(), &arguments(&["web", "--", "ls", "-l"]), false).unwrap();
        let expected = serde_json::json!({
            "args": ["ls", "-l"], "cwd": "/srv", "env": ["PATH=/bin"], "user": {"uid": 5, "gid": 6}, "terminal": false
        });
        assert_eq!(process, expected);
    }

    #[test]
    fn user_directory_and_variables_can_be_others() {
        let bundle = bundle(r#"{"args":["nginx"],"cwd":"/srv","user":{"uid":5,"gid":6}}"#);
        let arguments = arguments(&["-u", "0:7", "-w", "/", "-e", "A=1", "web"]);
        let process = process_in(bundle.path(), &arguments, true).unwrap();
        let expected = serde_json::json!({
            "args": ["sh"], "cwd": "/", "env": ["A=1", "TERM=xterm"], "user": {"uid": 0, "gid": 7}, "terminal": true
        });
        assert_eq!(process, expected);
    }

    #[test]
    fn a_user_who_is_no_number_is_named() {
        let told = format!("{:#}", parse_user("root").unwrap_err());
        assert!(told.starts_with("--user root: \"root\" is no number"), "{told}");
    }

    #[test]
    fn a_bundle_without_a_process_is_named() {
        let bundle = bundle("null");
        let told = process_in(bundle.path(), &arguments(&["web"]), false).unwrap_err().to_string();
        assert!(told.ends_with("config.json has no process"), "{told}");
    }
}
