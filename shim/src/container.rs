//! One container of the sandbox: what containerd asks about it, passed on to the guest in containerd's own messages.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use caisson_protocol::{
    containerd::{
        api::{CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, Mount, StartRequest},
        events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskStart},
        topics,
    },
    deadline,
    guest::CopyFileRequest,
    id::Id,
    paths::GUEST_BUNDLE_DIR,
    status::{Code, Status, sentence},
};
use nix::sys::signal::Signal;
use oci_spec::runtime::{ContainerState, Hook, Spec};
use protobuf::MessageField;
use tokio::time::timeout;
use tracing::warn;

use crate::{
    Error, Result,
    events::{Publisher, timestamp},
    files::ContainerFiles,
    hooks::{self, HostHooks},
    process::{Exit, Process, lock},
    stdio::{Paths, Stdio},
    vm::Vm,
};

/// How long a deleted process's output may take to reach containerd; runc's shim waits as long.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// A container that exists in the guest, or is about to.
#[derive(Debug)]
pub struct Container {
    /// containerd's name.
    pub id: Id,
    /// containerd's bundle.
    pub bundle: String,
    /// Its first process.
    pub init: Arc<Process>,
    execs: Mutex<HashMap<Id, Arc<Process>>>,
    files: Mutex<Option<ContainerFiles>>,
    hooks: HostHooks,
}

/// A container as the guest shall run it.
#[derive(Debug)]
pub struct ForGuest<'a> {
    /// Its `config.json`.
    pub spec: &'a Spec,
    /// How the guest mounts its root filesystem.
    pub rootfs: Mount,
}

impl Container {
    /// A container that the guest does not know yet.
    pub fn new(id: Id, request: &CreateTaskRequest, files: ContainerFiles, hooks: HostHooks) -> Self {
        let paths =
            Paths { stdin: request.stdin.clone(), stdout: request.stdout.clone(), stderr: request.stderr.clone() };
        Self {
            id,
            bundle: request.bundle.clone(),
            init: Arc::new(Process::new(paths, request.terminal)),
            execs: Mutex::default(),
            files: Mutex::new(Some(files)),
            hooks,
        }
    }

    /// Makes the container in the guest. `request` is containerd's, `guest` what the guest shall run.
    pub async fn create(
        &self,
        vm: &Vm,
        publisher: &Publisher,
        request: CreateTaskRequest,
        guest: ForGuest<'_>,
    ) -> Result<()> {
        self.run_hooks(&self.hooks.before_create, vm.pid, ContainerState::Creating).await?;
        let bundle = format!("{GUEST_BUNDLE_DIR}/{}", self.id);
        let config = CopyFileRequest {
            path: format!("{bundle}/config.json"),
            mode: 0o600,
            data: serde_json::to_vec(guest.spec)
                .map_err(|error| Error::Unsupported(format!("write the guest's config.json: {error}")))?,
            ..Default::default()
        };
        vm.guest.copy_file(deadline(vm.request_limit), &config).await?;

        let (stdio, dial) = Stdio::open(&vm.vsock, &self.init.paths)?;
        let event = TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..Default::default()
            }),
            pid: vm.pid,
            ..Default::default()
        };
        let request = CreateTaskRequest {
            bundle,
            rootfs: vec![guest.rootfs],
            stdin: dial.stdin,
            stdout: dial.stdout,
            stderr: dial.stderr,
            ..request
        };
        vm.task.create(deadline(vm.request_limit), &request).await?;
        self.init.keep_stdio(stdio);
        publisher.publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Starts the container or one of its execs; answers the process's pid for containerd.
    pub async fn start(&self, vm: &Vm, publisher: &Publisher, request: StartRequest) -> Result<u32> {
        let exec_id = request.exec_id.clone();
        let process = self.process(&exec_id)?;
        process.begin_start()?;
        let outcome = self.start_in_guest(vm, &process, request).await;
        let pid = match outcome {
            Ok(pid) => pid,
            Err(error) => {
                process.start_failed();
                return Err(error);
            }
        };
        let container_id = self.id.to_string();
        let pid = if exec_id.is_empty() {
            publisher.publish(
                topics::TASK_START_EVENT_TOPIC,
                &TaskStart { container_id, pid: vm.pid, ..Default::default() },
            );
            // runtime.md, "Lifecycle": a failing poststart hook is told and changes nothing.
            if let Err(error) = self.run_hooks(&self.hooks.after_start, vm.pid, ContainerState::Running).await {
                warn!(container = %self.id, error = %sentence(&error), "after the start");
            }
            vm.pid
        } else {
            let event = TaskExecStarted { container_id, exec_id: exec_id.clone(), pid, ..Default::default() };
            publisher.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
            pid
        };
        if let Some(exit) = process.started() {
            self.tell_exit(publisher, &exec_id, &process, exit, pid);
        }
        Ok(pid)
    }

    async fn start_in_guest(&self, vm: &Vm, process: &Process, request: StartRequest) -> Result<u32> {
        Ok(vm.task.start(deadline(vm.request_limit), &request).await.inspect_err(|_| drop(process.take_stdio()))?.pid)
    }

    /// Adds a process, to be started later.
    pub async fn exec(&self, vm: &Vm, publisher: &Publisher, request: ExecProcessRequest) -> Result<()> {
        let exec_id = Id::parse("exec id", &request.exec_id)?;
        let paths =
            Paths { stdin: request.stdin.clone(), stdout: request.stdout.clone(), stderr: request.stderr.clone() };
        let process = Arc::new(Process::new(paths, request.terminal));
        if lock(&self.execs).contains_key(&exec_id) {
            return Err(Error::Exists { what: "exec", id: exec_id });
        }
        lock(&self.execs).insert(exec_id.clone(), process.clone());
        let outcome = async {
            let (stdio, dial) = Stdio::open(&vm.vsock, &process.paths)?;
            let request = ExecProcessRequest { stdin: dial.stdin, stdout: dial.stdout, stderr: dial.stderr, ..request };
            vm.task.exec(deadline(vm.request_limit), &request).await?;
            process.keep_stdio(stdio);
            Ok(())
        };
        if let Err(error) = outcome.await {
            lock(&self.execs).remove(&exec_id);
            return Err(error);
        }
        let event =
            TaskExecAdded { container_id: self.id.to_string(), exec_id: exec_id.to_string(), ..Default::default() };
        publisher.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Sends a signal. A guest that does not even answer SIGKILL is ended with its virtual machine.
    pub async fn kill(&self, vm: &Vm, request: KillRequest) -> Result<()> {
        let process = self.process(&request.exec_id)?;
        if process.exit().is_some() {
            return Err(Error::Finished);
        }
        let Err(error) = vm.task.kill(deadline(vm.request_limit), &request).await else { return Ok(()) };
        let status = Status::from(error);
        match status.code {
            Code::DEADLINE_EXCEEDED if request.signal == Signal::SIGKILL as u32 => {
                warn!(container = %self.id, "the guest does not answer; its virtual machine is stopped");
                vm.stop().await
            }
            // The guest is going; with it goes the process.
            Code::UNAVAILABLE if timeout(vm.request_limit, process.wait()).await.is_ok() => Err(Error::Finished),
            _ => Err(Error::Remote { context: String::new(), status }),
        }
    }

    /// Removes a process that has ended; with no `exec_id`, the whole container. `vm` is `None` when it has ended.
    pub async fn delete(&self, vm: Option<&Vm>, publisher: &Publisher, request: DeleteRequest) -> Result<Exit> {
        let process = self.process(&request.exec_id)?;
        process.check_deletable()?;
        let mut exit = process.exit().unwrap_or(Exit { status: 0, at_unix_ns: 0 });
        if let Some(vm) = vm {
            match vm.task.delete(deadline(vm.request_limit + DRAIN_LIMIT), &request).await.map_err(Status::from) {
                Ok(answer) => exit.status = process.exit().map_or(answer.exit_status & 0xff, |exit| exit.status),
                // With the guest all that it had is gone.
                Err(status) if status.code == Code::UNAVAILABLE => {}
                Err(status) => return Err(Error::Remote { context: String::new(), status }),
            }
        }
        if let Some(stdio) = process.take_stdio() {
            stdio.drain(DRAIN_LIMIT).await;
        }
        if request.exec_id.is_empty() {
            self.remove_files(vm).await;
            if let Err(error) = self.run_hooks(&self.hooks.after_delete, 0, ContainerState::Stopped).await {
                warn!(container = %self.id, error = %sentence(&error), "after the deletion");
            }
            let event = TaskDelete {
                container_id: self.id.to_string(),
                pid: vm.map_or(0, |vm| vm.pid),
                exit_status: exit.status,
                exited_at: timestamp(exit.at_unix_ns),
                ..Default::default()
            };
            publisher.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        } else {
            lock(&self.execs).retain(|id, _| id.as_str() != request.exec_id);
        }
        Ok(exit)
    }

    async fn run_hooks(&self, hooks: &[Hook], pid: u32, status: ContainerState) -> Result<()> {
        hooks::run(hooks, self.id.as_str(), &self.bundle, pid, status).await
    }

    /// Removes what it had of the host's files; `vm` is `None` when it has ended.
    pub async fn remove_files(&self, vm: Option<&Vm>) {
        let files = lock(&self.files).take();
        if let Some(files) = files {
            files.remove(vm).await;
        }
    }

    /// The guest says that a process has ended, or the whole guest has.
    pub fn exited(&self, publisher: &Publisher, exec_id: &str, exit: Exit, pid: u32) {
        if let Ok(process) = self.process(exec_id)
            && process.exited(exit)
        {
            self.tell_exit(publisher, exec_id, &process, exit, pid);
        }
    }

    /// Everything in it ends with `exit`.
    pub fn all_exited(&self, publisher: &Publisher, exit: Exit, pid: u32) {
        let execs: Vec<String> = lock(&self.execs).keys().map(Id::to_string).collect();
        for exec_id in execs.iter().map(String::as_str).chain([""]) {
            self.exited(publisher, exec_id, exit, pid);
        }
    }

    /// The container's first process, or the exec with this name.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let id = Id::parse("exec id", exec_id)?;
        let process = lock(&self.execs).get(&id).cloned();
        process.ok_or(Error::NotFound { what: "exec", id })
    }

    fn tell_exit(&self, publisher: &Publisher, exec_id: &str, process: &Process, exit: Exit, pid: u32) {
        let container_id = self.id.to_string();
        let id = if exec_id.is_empty() { container_id.clone() } else { exec_id.to_owned() };
        tracing::info!(container = %self.id, exec = exec_id, status = exit.status, "process exited");
        publisher.publish(
            topics::TASK_EXIT_EVENT_TOPIC,
            &TaskExit {
                container_id,
                id,
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at_unix_ns),
                ..Default::default()
            },
        );
        process.announce(exit);
    }
}
