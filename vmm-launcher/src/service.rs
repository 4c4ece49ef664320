//! The `Vmm` contract over ttrpc: messages in, [`Vm`]'s verbs, messages out.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use caisson_protocol::{status::Status, vmm::*, vmm_ttrpc};
use ttrpc::asynchronous::TtrpcContext;

use crate::{
    Result,
    console::Audience,
    hypervisor::{Hypervisor, capabilities},
    request,
    vm::{Newborn, Vm},
};

/// Serves one VM.
pub(crate) struct Service<H> {
    pub(crate) vm: Arc<Vm<H>>,
}

fn answer<T>(result: Result<T>) -> ttrpc::Result<T> {
    result.map_err(|error| Status::from(error).into())
}

#[async_trait]
impl<H: Hypervisor> vmm_ttrpc::Vmm for Service<H> {
    async fn create(&self, _: &TtrpcContext, mut request: CreateRequest) -> ttrpc::Result<CreateResponse> {
        name_hypervisor::<H>(request.vm.as_mut());
        let newborn = answer(self.vm.create(request, Audience::Nobody).await)?;
        let Newborn { devices, pid, outlives_launcher } = newborn;
        Ok(CreateResponse { devices, pid, outlives_launcher, ..Default::default() })
    }

    async fn adopt(&self, _: &TtrpcContext, request: AdoptRequest) -> ttrpc::Result<AdoptResponse> {
        let found = answer(self.vm.adopt(request.state_dir.into()).await)?;
        Ok(AdoptResponse { devices: found.devices, pid: found.pid, state: found.state.into(), ..Default::default() })
    }

    async fn boot(&self, _: &TtrpcContext, _: BootRequest) -> ttrpc::Result<BootResponse> {
        answer(self.vm.boot().await)?;
        Ok(BootResponse::default())
    }

    async fn stop(&self, _: &TtrpcContext, request: StopRequest) -> ttrpc::Result<StopResponse> {
        self.vm.stop(Duration::from_millis(request.grace_ms.into())).await;
        Ok(StopResponse::default())
    }

    async fn wait(&self, _: &TtrpcContext, _: WaitRequest) -> ttrpc::Result<WaitResponse> {
        Ok(self.vm.wait().await)
    }

    async fn state(&self, _: &TtrpcContext, _: StateRequest) -> ttrpc::Result<StateResponse> {
        let (state, exit) = self.vm.state();
        let mut response = StateResponse { state: state.into(), ..Default::default() };
        if let Some(exit) = exit {
            response.console_tail = exit.console_tail;
        } else if let Ok(hypervisor) = self.vm.alive("describe") {
            response.pid = hypervisor.pid();
            response.console_tail = hypervisor.console().tail();
        }
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> ttrpc::Result<PauseResponse> {
        answer(self.vm.pause().await)?;
        self.vm.remember();
        Ok(PauseResponse::default())
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<ResumeResponse> {
        answer(self.vm.resume().await)?;
        Ok(ResumeResponse::default())
    }

    async fn snapshot(&self, _: &TtrpcContext, request: SnapshotRequest) -> ttrpc::Result<SnapshotResponse> {
        answer(answer_alive(&self.vm, "snapshot")?.snapshot(&request).await)?;
        Ok(SnapshotResponse::default())
    }

    async fn restore(&self, _: &TtrpcContext, mut request: RestoreRequest) -> ttrpc::Result<RestoreResponse> {
        name_hypervisor::<H>(request.vm.as_mut());
        let newborn = answer(self.vm.restore(request, Audience::Nobody).await)?;
        Ok(RestoreResponse { devices: newborn.devices, pid: newborn.pid, ..Default::default() })
    }

    async fn attach(&self, _: &TtrpcContext, request: AttachRequest) -> ttrpc::Result<AttachResponse> {
        let hypervisor = answer_alive(&self.vm, "attach a device to")?;
        answer(request::check_device(&request.device))?;
        let device = answer(hypervisor.attach(&request.device).await)?;
        self.vm.remember();
        Ok(AttachResponse { device: Some(device).into(), ..Default::default() })
    }

    async fn detach(&self, _: &TtrpcContext, request: DetachRequest) -> ttrpc::Result<DetachResponse> {
        answer(answer_alive(&self.vm, "detach a device from")?.detach(&request.id).await)?;
        self.vm.remember();
        Ok(DetachResponse::default())
    }

    async fn resize_vcpus(&self, _: &TtrpcContext, request: ResizeVcpusRequest) -> ttrpc::Result<ResizeVcpusResponse> {
        let vcpus = answer(answer_alive(&self.vm, "resize")?.resize_vcpus(&request).await)?;
        self.vm.remember();
        Ok(ResizeVcpusResponse { vcpus, ..Default::default() })
    }

    async fn resize_memory(
        &self,
        _: &TtrpcContext,
        request: ResizeMemoryRequest,
    ) -> ttrpc::Result<ResizeMemoryResponse> {
        let memory_mib = answer(answer_alive(&self.vm, "resize")?.resize_memory(&request).await)?;
        self.vm.remember();
        Ok(ResizeMemoryResponse { memory_mib, ..Default::default() })
    }

    async fn resize_balloon(
        &self,
        _: &TtrpcContext,
        request: ResizeBalloonRequest,
    ) -> ttrpc::Result<ResizeBalloonResponse> {
        let hypervisor = answer_alive(&self.vm, "resize the balloon of")?;
        let memory_mib = answer(hypervisor.resize_balloon(&request).await)?;
        Ok(ResizeBalloonResponse { memory_mib, ..Default::default() })
    }

    async fn capabilities(
        &self,
        _: &TtrpcContext,
        request: CapabilitiesRequest,
    ) -> ttrpc::Result<CapabilitiesResponse> {
        answer(capabilities::<H>(&request.hypervisor_path, &request.options).await)
    }

    async fn metrics(&self, _: &TtrpcContext, _: MetricsRequest) -> ttrpc::Result<MetricsResponse> {
        let hypervisor = answer_alive(&self.vm, "measure")?;
        let bytes = hypervisor.console().bytes();
        let text = format!(
            "# HELP caisson_vm_console_bytes_total Bytes that the guest wrote to its console.\n\
             # TYPE caisson_vm_console_bytes_total counter\n\
             caisson_vm_console_bytes_total {bytes}\n{}",
            answer(hypervisor.metrics().await)?
        );
        Ok(MetricsResponse { text, ..Default::default() })
    }
}

fn answer_alive<H: Hypervisor>(vm: &Vm<H>, verb: &'static str) -> ttrpc::Result<Arc<H>> {
    answer(vm.alive(verb))
}

/// The default where the request names none.
fn name_hypervisor<H: Hypervisor>(vm: Option<&mut VmConfig>) {
    if let Some(vm) = vm
        && vm.hypervisor_path.is_empty()
    {
        vm.hypervisor_path = H::DEFAULT_PATH.to_owned();
    }
}
