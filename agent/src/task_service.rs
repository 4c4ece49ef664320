//! containerd's Task contract, served in the guest: each request is one call to a container.

use std::{ops::RangeInclusive, sync::Arc, time::UNIX_EPOCH};

use async_trait::async_trait;
use caisson_protocol::{
    containerd::{
        api::{
            CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
            CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
            PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
            StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status as TaskStatus,
            UpdateTaskRequest, WaitRequest, WaitResponse,
        },
        shim_async::Task,
    },
    id::Id,
    status::Status,
};
use nix::unistd::Pid;
use protobuf::{MessageField, well_known_types::timestamp::Timestamp};
use serde::de::IgnoredAny;
use ttrpc::r#async::TtrpcContext;

use crate::{
    containers::Containers,
    error::{Error, Result},
    process::Stdio,
    reaper::Exit,
    resources,
    state::State,
    stats,
};

/// `signal(7)`: 0 only asks whether the process is there, the last are the real-time ones.
const SIGNALS: RangeInclusive<i32> = 0..=64;

/// Serves containers.
pub struct TaskService(pub Arc<Containers>);

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(Status::unimplemented("restoring a container from a checkpoint").into());
        }
        let containers = self.0.clone();
        let pid = to_the_end(async move { containers.create(&request).await }).await?;
        Ok(CreateTaskResponse { pid: number(pid), ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.0.get(&request.id)?;
        let (reaper, events) = (self.0.reaper.clone(), self.0.events.clone());
        let start = async move {
            match request.exec_id.as_str() {
                "" => container.init.start().await,
                exec_id => container.start_exec(&reaper, &events, exec_id).await,
            }
        };
        let pid = to_the_end(start).await?;
        Ok(StartResponse { pid: number(pid), ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        Id::parse("exec id", &request.exec_id).map_err(|error| Error::Invalid(error.to_string()))?;
        let unreadable = |error: &dyn std::error::Error| {
            Error::Invalid(format!("process {}: read its description: {error}", request.exec_id))
        };
        let description = str::from_utf8(&request.spec.value).map_err(|error| unreadable(&error))?;
        serde_json::from_str::<IgnoredAny>(description).map_err(|error| unreadable(&error))?;
        let stdio =
            Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        self.0.get(&request.id)?.add_exec(&request.exec_id, stdio, description)?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.0.get(&request.id)?;
        let signal = i32::try_from(request.signal).ok().filter(|number| SIGNALS.contains(number));
        let signal = signal.ok_or_else(|| Error::Invalid(format!("{} is not a signal", request.signal)))?;
        if request.all && request.exec_id.is_empty() {
            container.cgroup().kill(signal)?;
        } else {
            container.process(&request.exec_id)?.kill(signal)?;
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.0.get(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await;
        let exit = exit.ok_or_else(|| Error::NotFound(format!("container {} was removed", request.id)))?;
        Ok(WaitResponse { exit_status: exit.status, exited_at: exited_at(exit), ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.0.get(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let (state, stdio) = (process.state(), process.stdio.clone());
        let status = match state {
            State::Added | State::Starting | State::Created(_) => TaskStatus::CREATED,
            State::Running(_) => TaskStatus::RUNNING,
            State::Paused(_) => TaskStatus::PAUSED,
            State::Exited(..) => TaskStatus::STOPPED,
        };
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle().display().to_string(),
            pid: state.pid().map_or(0, number),
            status: status.into(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status: state.exited().map_or(0, |exit| exit.status),
            exited_at: state.exited().map_or_else(MessageField::none, exited_at),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.0.get(&request.id)?.cgroup().pids();
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid: number(pid), ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (containers, container) = (self.0.clone(), self.0.get(&request.id)?);
        let delete = async move {
            if !request.exec_id.is_empty() {
                return container.delete_exec(&request.exec_id).await;
            }
            container.delete().await?;
            containers.remove(&request.id);
            Ok(container.init.clone())
        };
        let state = to_the_end(delete).await?.state();
        Ok(DeleteResponse {
            pid: state.pid().map_or(0, number),
            exit_status: state.exited().map_or(0, |exit| exit.status),
            exited_at: state.exited().map_or_else(MessageField::none, exited_at),
            ..Default::default()
        })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let size =
            |value: u32| u16::try_from(value).map_err(|_| Error::Invalid(format!("{value} is no terminal size")));
        let process = self.0.get(&request.id)?.process(&request.exec_id)?;
        process.resize(size(request.width)?, size(request.height)?)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        // Input ends where it comes from: the host closes its end of the connection behind the last byte.
        self.0.get(&request.id)?.process(&request.exec_id)?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.0.get(&request.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.0.get(&request.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.0.get(&request.id)?;
        let asked = serde_json::from_slice(&request.resources.value)
            .map_err(|error| Error::Invalid(format!("update container {}: read the resources: {error}", request.id)))?;
        resources::apply(container.cgroup(), asked)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = stats::of(self.0.get(&request.id)?.cgroup())?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let pid = self.0.get(&request.id)?.init.state().pid().map_or(0, number);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid: pid, version, ..Default::default() })
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Status::unimplemented("checkpointing a container").into())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // The guest ends by Guest.Shutdown; containerd's word is about its shim.
        Ok(Empty::new())
    }
}

/// Does the whole of it even when the request's deadline passes on the way: nothing stays half made or half removed.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|error| Err(Error::WrongState(format!("the work was cut off: {error}"))))
}

fn number(pid: Pid) -> u32 {
    pid.as_raw().cast_unsigned()
}

fn exited_at(exit: Exit) -> MessageField<Timestamp> {
    let since = exit.at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    MessageField::some(Timestamp { seconds, nanos: since.subsec_nanos().cast_signed(), ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_time_keeps_its_nanoseconds() {
        let exit = Exit { status: 0, at: UNIX_EPOCH + Duration::new(5, 7) };
        let time = exited_at(exit).unwrap();
        assert_eq!((time.seconds, time.nanos), (5, 7));
    }
}
