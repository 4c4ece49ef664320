//! containerd's Task service: every request is parsed here and handed to the sandbox or one of its containers.

use std::sync::Arc;

use async_trait::async_trait;
use caisson_protocol::{
    containerd::{
        api::{
            CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
            CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
            PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
            StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
        },
        events::task::{TaskPaused, TaskResumed},
        shim_async::Task,
        topics,
    },
    deadline,
    status::Status,
};
use tokio::sync::watch;
use tracing::warn;
use ttrpc::r#async::TtrpcContext;

use crate::{Error, events::timestamp, process::Exit, sandbox::Sandbox};

/// Serves one sandbox.
pub struct TaskService {
    sandbox: Arc<Sandbox>,
    done: watch::Sender<bool>,
}

impl TaskService {
    /// `done` turns true when containerd needs this shim no more.
    pub fn new(sandbox: Arc<Sandbox>, done: watch::Sender<bool>) -> Self {
        Self { sandbox, done }
    }
}

/// Tells containerd's log what its caller is told.
fn refused(verb: &'static str) -> impl FnOnce(Error) -> ttrpc::Error {
    move |error| {
        let status = Status::of(error.code(), &error);
        warn!(verb, code = ?status.code, error = %status, "request failed");
        status.into()
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.sandbox.create(request).await.map_err(refused("create"))?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm()?;
        let pid = container.start(&vm, self.sandbox.publisher(), request).await.map_err(refused("start"))?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm()?;
        container.exec(&vm, self.sandbox.publisher(), request).await.map_err(refused("exec"))?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm()?;
        container.kill(&vm, request).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.sandbox.container(&request.id)?.process(&request.exec_id)?;
        let Exit { status, at_unix_ns } = process.wait().await;
        Ok(WaitResponse { exit_status: status, exited_at: timestamp(at_unix_ns), ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let container = self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm().ok();
        let whole = request.exec_id.is_empty();
        let exit =
            container.delete(vm.as_deref(), self.sandbox.publisher(), request).await.map_err(refused("delete"))?;
        if whole {
            self.sandbox.forget(&container.id);
        }
        Ok(DeleteResponse {
            pid: vm.map_or(0, |vm| vm.pid),
            exit_status: exit.status,
            exited_at: timestamp(exit.at_unix_ns),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.sandbox.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle.clone(),
            pid: self.sandbox.vm().map_or(0, |vm| vm.pid),
            status: process.status().into(),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.terminal,
            ..Default::default()
        };
        if let Some(exit) = process.exit() {
            response.exit_status = exit.status;
            response.exited_at = timestamp(exit.at_unix_ns);
        }
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm()?;
        vm.task.pids(deadline(vm.request_limit), &request).await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm()?;
        container.init.paused()?;
        if let Err(error) = vm.task.pause(deadline(vm.request_limit), &request).await {
            let _ = container.init.resumed();
            return Err(error);
        }
        let event = TaskPaused { container_id: request.id, ..Default::default() };
        self.sandbox.publisher().publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm()?;
        container.init.resumed()?;
        if let Err(error) = vm.task.resume(deadline(vm.request_limit), &request).await {
            let _ = container.init.paused();
            return Err(error);
        }
        let event = TaskResumed { container_id: request.id, ..Default::default() };
        self.sandbox.publisher().publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.sandbox.container(&request.id)?.process(&request.exec_id)?;
        let vm = self.sandbox.vm()?;
        vm.task.resize_pty(deadline(vm.request_limit), &request).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.sandbox.container(&request.id)?.process(&request.exec_id)?.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm()?;
        vm.task.update(deadline(vm.request_limit), &request).await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.sandbox.container(&request.id)?;
        let vm = self.sandbox.vm()?;
        vm.task.stats(deadline(vm.request_limit), &request).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Status::unimplemented("checkpointing a container").into())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        self.sandbox.container(&request.id)?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.sandbox.vm().map_or(0, |vm| vm.pid),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        if request.now || self.sandbox.is_empty() {
            // Answer when nothing is left, so that containerd's caller finds nothing.
            self.sandbox.end().await;
            self.done.send_replace(true);
        }
        Ok(Empty::new())
    }
}
