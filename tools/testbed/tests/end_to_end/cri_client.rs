//! What a kubelet says to containerd, as far as the tests need it: `cri-api/pkg/apis/runtime/v1/api.proto`.

use std::{collections::HashMap, path::Path};

use anyhow::{Context, Result, anyhow};
use caisson_testbed::BUSYBOX;
use prost::Message;
use tokio::{runtime::Runtime, time::timeout};
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::LIMIT;

/// A connection to containerd's CRI.
pub struct Cri {
    runtime: Runtime,
    client: Grpc<Channel>,
    /// Where the pods' control groups are.
    cgroup: String,
}

/// What a manifest says of a pod.
#[derive(Clone, Copy, Default)]
pub struct WantedPod<'a> {
    pub name: &'a str,
    /// Of its RuntimeClass.
    pub handler: &'a str,
    pub annotations: &'a [(&'a str, &'a str)],
    /// Its containers' limits together; 0 is none.
    pub memory_bytes: i64,
}

/// A pod with one container, which sleeps.
pub struct Pod {
    pub sandbox: String,
    pub container: String,
}

impl Cri {
    pub fn connect(socket: &Path, cgroup: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let channel = runtime.block_on(endpoint.connect()).context("connect to containerd")?;
        Ok(Self { runtime, client: Grpc::new(channel), cgroup: format!("/{cgroup}") })
    }

    /// As a kubelet starts it.
    pub fn run_pod(&mut self, wanted: &WantedPod) -> Result<Pod> {
        let WantedPod { name, handler, annotations, memory_bytes } = *wanted;
        let annotations = annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        // The host's network needs no CNI plugin.
        let options = NamespaceOption { network: NODE };
        let security = SecurityContext { namespace_options: Some(options) };
        let config = PodSandboxConfig {
            metadata: Some(PodMetadata {
                name: name.into(),
                uid: name.into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            annotations,
            linux: Some(LinuxPod {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(security),
                resources: Some(Resources { memory_limit_in_bytes: memory_bytes }),
            }),
        };
        let run = RunPodSandbox { config: Some(config.clone()), runtime_handler: handler.into() };
        let sandbox = self.call::<_, PodSandboxId>("RunPodSandbox", run)?.pod_sandbox_id;
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".into(), attempt: 0 }),
            image: Some(ImageSpec { image: BUSYBOX.into() }),
            command: vec!["sleep".into(), "600".into()],
            linux: Some(LinuxContainer {
                security_context: Some(ContainerSecurity { namespace_options: Some(options) }),
            }),
        };
        let create =
            CreateContainer { pod_sandbox_id: sandbox.clone(), config: Some(container), sandbox_config: Some(config) };
        let container = self.call::<_, ContainerId>("CreateContainer", create)?.container_id;
        self.call::<_, Nothing>("StartContainer", ContainerId { container_id: container.clone() })?;
        Ok(Pod { sandbox, container })
    }

    /// What a program in the pod's container writes; an error when it fails.
    pub fn exec(&mut self, pod: &Pod, command: &[&str]) -> Result<String> {
        let cmd = command.iter().map(|word| (*word).to_owned()).collect();
        let said: ExecSaid =
            self.call("ExecSync", ExecSync { container_id: pod.container.clone(), cmd, timeout: 30 })?;
        anyhow::ensure!(said.exit_code == 0, "{command:?} ended with {}: {}", said.exit_code, text(&said.stderr));
        Ok(text(&said.stdout))
    }

    /// Stops the pod with everything in it, and removes it.
    pub fn remove_pod(&mut self, pod: Pod) -> Result<()> {
        let id = PodSandboxId { pod_sandbox_id: pod.sandbox };
        self.call::<_, Nothing>("StopPodSandbox", id.clone())?;
        self.call::<_, Nothing>("RemovePodSandbox", id)?;
        Ok(())
    }

    fn call<Q, A>(&mut self, method: &str, request: Q) -> Result<A>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = PathAndQuery::try_from(format!("/runtime.v1.RuntimeService/{method}"))?;
        let client = &mut self.client;
        let call = async {
            client.ready().await.context("reach containerd")?;
            let answer = client.unary(Request::new(request), path, ProstCodec::<Q, A>::default()).await;
            answer.map(tonic::Response::into_inner).map_err(|status| anyhow!("{method}: {}", status.message()))
        };
        self.runtime
            .block_on(async { timeout(LIMIT, call).await })
            .with_context(|| format!("{method} takes too long"))?
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `NamespaceMode.NODE`: the host's.
const NODE: i32 = 2;

#[derive(Clone, Message)]
struct PodMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(uint32, tag = "4")]
    attempt: u32,
}

#[derive(Clone, Copy, Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
}

#[derive(Clone, Message)]
struct SecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, Message)]
struct LinuxPod {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security_context: Option<SecurityContext>,
    #[prost(message, optional, tag = "5")]
    resources: Option<Resources>,
}

/// `LinuxContainerResources`.
#[derive(Clone, Copy, Message)]
struct Resources {
    #[prost(int64, tag = "4")]
    memory_limit_in_bytes: i64,
}

#[derive(Clone, Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodMetadata>,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPod>,
}

#[derive(Clone, Message)]
struct RunPodSandbox {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
    #[prost(string, tag = "2")]
    runtime_handler: String,
}

#[derive(Clone, Message)]
struct PodSandboxId {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

#[derive(Clone, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint32, tag = "2")]
    attempt: u32,
}

#[derive(Clone, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, Message)]
struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, Message)]
struct LinuxContainer {
    #[prost(message, optional, tag = "2")]
    security_context: Option<ContainerSecurity>,
}

#[derive(Clone, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainer>,
}

#[derive(Clone, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, Message)]
struct ContainerId {
    #[prost(string, tag = "1")]
    container_id: String,
}

#[derive(Clone, Message)]
struct ExecSync {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, Message)]
struct ExecSaid {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, Message)]
struct Nothing {}
