//! The `Vmm` contract over ttrpc: messages in, [`Vm`]'s verbs, messages out.

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use caisson_protocol::{status::Status, vmm::*, vmm_ttrpc};
use ttrpc::asynchronous::TtrpcContext;

use crate::{
    Error, Result,
    console::Audience,
    hypervisor::{Hypervisor, capabilities},
    request,
    vm::{Newborn, Vm},
};

/// Serves one VM.
pub(crate) struct Service<H> {
    pub(crate) vm: Arc<Vm<H>>,
}

impl<H: Hypervisor> Service<H> {
    /// Does `verb` whole, also when its caller has given up by then: ttrpc drops what is not done at the caller's deadline,
    /// and a VM would be left between two states.
    async fn whole<T, W>(&self, verb: impl FnOnce(Arc<Vm<H>>) -> W) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        // The work is broken off only by the end of this process.
        answer(tokio::spawn(verb(self.vm.clone())).await.unwrap_or(Err(Error::Stopped)))
    }

    /// Likewise for what changes nothing but the hypervisor. Another launcher then knows of it, also of a change that was done
    /// by half.
    async fn change<T, W>(
        &self,
        verb: &'static str,
        change: impl FnOnce(Arc<H>) -> W + Send + 'static,
    ) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        self.whole(move |vm| async move {
            let changed = change(vm.alive(verb)?).await;
            vm.remember();
            changed
        })
        .await
    }
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
        self.whole(|vm| async move { vm.boot().await }).await?;
        Ok(BootResponse::default())
    }

    async fn stop(&self, _: &TtrpcContext, request: StopRequest) -> ttrpc::Result<StopResponse> {
        let grace = Duration::from_millis(request.grace_ms.into());
        self.whole(move |vm| async move {
            vm.stop(grace).await;
            Ok(())
        })
        .await?;
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
        self.whole(|vm| async move {
            vm.pause().await?;
            vm.remember();
            Ok(())
        })
        .await?;
        Ok(PauseResponse::default())
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<ResumeResponse> {
        self.whole(|vm| async move { vm.resume().await }).await?;
        Ok(ResumeResponse::default())
    }

    async fn snapshot(&self, _: &TtrpcContext, request: SnapshotRequest) -> ttrpc::Result<SnapshotResponse> {
        self.change("snapshot", |hypervisor| async move { hypervisor.snapshot(&request).await }).await?;
        Ok(SnapshotResponse::default())
    }

    async fn restore(&self, _: &TtrpcContext, mut request: RestoreRequest) -> ttrpc::Result<RestoreResponse> {
        name_hypervisor::<H>(request.vm.as_mut());
        let newborn = answer(self.vm.restore(request, Audience::Nobody).await)?;
        Ok(RestoreResponse { devices: newborn.devices, pid: newborn.pid, ..Default::default() })
    }

    async fn attach(&self, _: &TtrpcContext, request: AttachRequest) -> ttrpc::Result<AttachResponse> {
        let attach = |hypervisor: Arc<H>| async move {
            request::check_device(&request.device)?;
            hypervisor.attach(&request.device).await
        };
        let device = self.change("attach a device to", attach).await?;
        Ok(AttachResponse { device: Some(device).into(), ..Default::default() })
    }

    async fn detach(&self, _: &TtrpcContext, request: DetachRequest) -> ttrpc::Result<DetachResponse> {
        let detach = |hypervisor: Arc<H>| async move { hypervisor.detach(&request.id).await };
        self.change("detach a device from", detach).await?;
        Ok(DetachResponse::default())
    }

    async fn resize_vcpus(&self, _: &TtrpcContext, request: ResizeVcpusRequest) -> ttrpc::Result<ResizeVcpusResponse> {
        let resize = |hypervisor: Arc<H>| async move { hypervisor.resize_vcpus(&request).await };
        let vcpus = self.change("resize", resize).await?;
        Ok(ResizeVcpusResponse { vcpus, ..Default::default() })
    }

    async fn resize_memory(
        &self,
        _: &TtrpcContext,
        request: ResizeMemoryRequest,
    ) -> ttrpc::Result<ResizeMemoryResponse> {
        let resize = |hypervisor: Arc<H>| async move { hypervisor.resize_memory(&request).await };
        let memory_mib = self.change("resize", resize).await?;
        Ok(ResizeMemoryResponse { memory_mib, ..Default::default() })
    }

    async fn resize_balloon(
        &self,
        _: &TtrpcContext,
        request: ResizeBalloonRequest,
    ) -> ttrpc::Result<ResizeBalloonResponse> {
        let resize = |hypervisor: Arc<H>| async move { hypervisor.resize_balloon(&request).await };
        let memory_mib = self.change("resize the balloon of", resize).await?;
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
        let hypervisor = answer(self.vm.alive("measure"))?;
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

/// The default where the request names none.
fn name_hypervisor<H: Hypervisor>(vm: Option<&mut VmConfig>) {
    if let Some(vm) = vm
        && vm.hypervisor_path.is_empty()
    {
        vm.hypervisor_path = H::DEFAULT_PATH.to_owned();
    }
}

#[cfg(test)]
mod tests {
    use caisson_protocol::vmm_ttrpc::Vmm;
    use tokio::task::yield_now;

    use super::*;
    use crate::vm::tests::created;

    #[tokio::test]
    async fn a_verb_is_done_whole_when_its_caller_has_given_up() {
        let vm = created("late").await;
        vm.boot().await.unwrap();
        let service = Service { vm: vm.clone() };
        let context = TtrpcContext {
            mh: Default::default(),
            metadata: Default::default(),
            timeout_nano: 0,
            connection_data: Default::default(),
        };
        let fake = vm.alive("pause").unwrap();
        tokio::select! {
            _ = service.pause(&context, PauseRequest::default()) => panic!("the hypervisor has not answered"),
            () = fake.asked.notified() => {}
        }
        assert_eq!(vm.state().0, VmState::PAUSED);
        // It cannot be paused, and so it runs, whoever listens.
        fake.answer.notify_one();
        while vm.state().0 != VmState::RUNNING {
            yield_now().await;
        }
    }
}
