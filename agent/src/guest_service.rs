//! caisson's Guest contract: everything around the containers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use caisson_protocol::{
    guest::{
        AddStorageRequest, AddStorageResponse, ConsoleRequest, ConsoleResponse, CopyFileRequest, CopyFileResponse,
        Event, EventsRequest, InfoRequest, InfoResponse, Interface, MetricsRequest, MetricsResponse,
        OnlineResourcesRequest, OnlineResourcesResponse, RemoveStorageRequest, RemoveStorageResponse, ReseedRequest,
        ReseedResponse, Route, SetTimeRequest, SetTimeResponse, SetupRequest, SetupResponse, ShutdownRequest,
        ShutdownResponse, UpdateNetworkRequest, UpdateNetworkResponse,
    },
    guest_ttrpc::Guest,
    status::{Code, Status},
};
use nix::sys::utsname::uname;
use protobuf::MessageField;
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::{
    boot, cgroup,
    cmdline::Parameters,
    console,
    containers::Containers,
    error::{Error, Result},
    files, machine, metrics,
    network::Network,
    storage,
};

/// Serves the guest.
pub struct GuestService {
    /// Its containers.
    pub containers: Arc<Containers>,
    /// What the host asked of it.
    pub parameters: Parameters,
    /// Its network.
    pub network: Network,
    /// How long the kernel took until the agent's first instruction.
    pub kernel_time: Duration,
    /// How long the agent took until it called the host.
    pub agent_time: Duration,
    /// Whether it is a sandbox already.
    pub is_set_up: AtomicBool,
}

impl GuestService {
    fn information(&self) -> InfoResponse {
        InfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: uname()
                .map_or_else(|_| String::new(), |name| name.release().to_string_lossy().into_owned()),
            kernel_ns: nanoseconds(self.kernel_time),
            agent_ns: nanoseconds(self.agent_time),
            vcpus: machine::vcpus(),
            memory_bytes: machine::memory_bytes(),
            ..Default::default()
        }
    }

    async fn set_up(&self, request: &SetupRequest) -> Result<()> {
        if self.is_set_up.swap(true, Ordering::Relaxed) {
            return Err(Error::WrongState("the guest is set up already".into()));
        }
        if request.time_unix_ns != 0 {
            machine::set_time(request.time_unix_ns)?;
        }
        if !request.entropy.is_empty() {
            machine::reseed(&request.entropy)?;
        }
        if !request.hostname.is_empty() {
            machine::set_hostname(&request.hostname)?;
        }
        if !request.dns.is_empty() {
            machine::set_dns(&request.dns)?;
        }
        for storage in &request.storages {
            storage::add(storage).await?;
        }
        self.update_network(&request.interfaces, &request.routes).await
    }

    async fn update_network(&self, interfaces: &[Interface], routes: &[Route]) -> Result<()> {
        for interface in interfaces {
            self.network.configure(interface).await?;
        }
        for route in routes {
            self.network.route(route).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Guest for GuestService {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        self.set_up(&request).await?;
        Ok(SetupResponse { info: MessageField::some(self.information()), ..Default::default() })
    }

    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> ttrpc::Result<InfoResponse> {
        Ok(self.information())
    }

    async fn events(&self, _: &TtrpcContext, _: EventsRequest, host: ServerStreamSender<Event>) -> ttrpc::Result<()> {
        let events = &self.containers.events;
        loop {
            let event = events.next().await;
            if let Err(error) = host.send(&event).await {
                events.push_back(event);
                return Err(error);
            }
        }
    }

    async fn add_storage(&self, _: &TtrpcContext, request: AddStorageRequest) -> ttrpc::Result<AddStorageResponse> {
        let storage = request.storage.as_ref().ok_or_else(|| Error::Invalid("no storage was named".into()))?;
        storage::add(storage).await?;
        Ok(AddStorageResponse::new())
    }

    async fn remove_storage(
        &self,
        _: &TtrpcContext,
        request: RemoveStorageRequest,
    ) -> ttrpc::Result<RemoveStorageResponse> {
        storage::remove(&request.mount_point)?;
        Ok(RemoveStorageResponse::new())
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> ttrpc::Result<UpdateNetworkResponse> {
        self.update_network(&request.interfaces, &request.routes).await?;
        Ok(UpdateNetworkResponse::new())
    }

    async fn online_resources(
        &self,
        _: &TtrpcContext,
        request: OnlineResourcesRequest,
    ) -> ttrpc::Result<OnlineResourcesResponse> {
        machine::online(request.vcpus).await?;
        let (vcpus, memory_bytes) = (machine::vcpus(), machine::memory_bytes());
        Ok(OnlineResourcesResponse { vcpus, memory_bytes, ..Default::default() })
    }

    async fn copy_file(&self, _: &TtrpcContext, request: CopyFileRequest) -> ttrpc::Result<CopyFileResponse> {
        files::copy(&request)?;
        Ok(CopyFileResponse::new())
    }

    async fn set_time(&self, _: &TtrpcContext, request: SetTimeRequest) -> ttrpc::Result<SetTimeResponse> {
        machine::set_time(request.unix_ns)?;
        Ok(SetTimeResponse::new())
    }

    async fn reseed(&self, _: &TtrpcContext, request: ReseedRequest) -> ttrpc::Result<ReseedResponse> {
        machine::reseed(&request.entropy)?;
        Ok(ReseedResponse::new())
    }

    async fn metrics(&self, _: &TtrpcContext, _: MetricsRequest) -> ttrpc::Result<MetricsResponse> {
        Ok(MetricsResponse { text: metrics::text(&self.containers), ..Default::default() })
    }

    async fn console(&self, _: &TtrpcContext, request: ConsoleRequest) -> ttrpc::Result<ConsoleResponse> {
        if !self.parameters.console {
            let reason = "a shell in the guest is not allowed: the configuration has no debug console";
            return Err(Status::new(Code::PERMISSION_DENIED, reason).into());
        }
        console::open(&self.containers.reaper, &request).await?;
        Ok(ConsoleResponse::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<ShutdownResponse> {
        cgroup::kill_all();
        boot::end(self.parameters.end);
        Ok(ShutdownResponse::new())
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
