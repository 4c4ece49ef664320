//! What people's tools ask of this sandbox (`protocol/proto/sandbox.proto`), beside containerd's Task service.

use std::sync::Arc;

use async_trait::async_trait;
use caisson_protocol::{
    containerd::types::task::Status as TaskStatus,
    deadline,
    guest::{InfoRequest, MetricsRequest as GuestMetricsRequest},
    sandbox::{
        ConsoleRequest, ConsoleResponse, Container as ContainerReport, InspectRequest, InspectResponse, MetricsRequest,
        MetricsResponse,
    },
    sandbox_ttrpc,
};
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use crate::{console, container::Container, sandbox::Sandbox};

/// Serves one sandbox.
pub struct SandboxService(pub Arc<Sandbox>);

#[async_trait]
impl sandbox_ttrpc::Sandbox for SandboxService {
    async fn inspect(&self, _: &TtrpcContext, _: InspectRequest) -> ttrpc::Result<InspectResponse> {
        let vm = self.0.vm()?;
        let guest = vm.guest.info(deadline(vm.request_limit), &InfoRequest::new()).await?;
        let mut containers: Vec<_> = self.0.containers().iter().map(|container| report(container)).collect();
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(InspectResponse {
            configuration: vm.configuration.clone(),
            guest: MessageField::some(guest),
            containers,
            ..Default::default()
        })
    }

    async fn metrics(&self, _: &TtrpcContext, _: MetricsRequest) -> ttrpc::Result<MetricsResponse> {
        let vm = self.0.vm()?;
        let guest = vm.guest.metrics(deadline(vm.request_limit), &GuestMetricsRequest::new()).await?;
        Ok(MetricsResponse { text: vm.launcher_metrics().await? + &guest.text, ..Default::default() })
    }

    async fn console(&self, _: &TtrpcContext, request: ConsoleRequest) -> ttrpc::Result<ConsoleResponse> {
        let vm = self.0.vm()?;
        let socket = console::open(&vm, self.0.dir(), request.columns, request.rows).await?;
        Ok(ConsoleResponse { socket: socket.to_string_lossy().into_owned(), ..Default::default() })
    }
}

fn report(container: &Container) -> ContainerReport {
    let status = match container.init.status() {
        TaskStatus::CREATED => "created",
        TaskStatus::RUNNING => "running",
        TaskStatus::PAUSED | TaskStatus::PAUSING => "paused",
        TaskStatus::STOPPED => "stopped",
        TaskStatus::UNKNOWN => "unknown",
    };
    ContainerReport {
        id: container.id.to_string(),
        bundle: container.bundle.clone(),
        status: status.to_owned(),
        ..Default::default()
    }
}
