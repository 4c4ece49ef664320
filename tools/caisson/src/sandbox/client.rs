//! One sandbox's shim, which serves containerd's Task and our Sandbox service on one socket.

use std::time::Duration;

use anyhow::{Context, anyhow};
use caisson_protocol::{
    containerd::shim_async::{Client, TaskClient},
    paths,
    sandbox::{Container, InspectRequest, InspectResponse},
    sandbox_ttrpc::SandboxClient,
    status::Status,
};
use tokio::{net::UnixStream, time::timeout};

use super::found::{self, Record};

/// For any one request; the shim's own requests to the guest have shorter ones.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// A connection to the shim of a sandbox.
pub(super) struct Shim {
    pub(super) record: Record,
    /// What the shim keeps for the sandbox on the host; for root only.
    pub(super) dir: std::path::PathBuf,
    pub(super) task: TaskClient,
    pub(super) sandbox: SandboxClient,
}

impl Shim {
    /// Connects to the sandbox that a person calls `name`.
    pub(super) async fn of(name: &str) -> anyhow::Result<Self> {
        let found::Sandbox { dir, record } = found::find(&paths::sandboxes_dir(), name)?;
        let socket = dir.join("shim.sock");
        let connecting = async {
            let connected = timeout(DEADLINE, UnixStream::connect(&socket)).await;
            anyhow::Ok(connected.map_err(|_| anyhow!("no answer within {} s", DEADLINE.as_secs()))??)
        };
        let stream = connecting
            .await
            .with_context(|| format!("reach the shim of sandbox {} at {}", record.id, socket.display()))?;
        let client = Client::new(stream.into());
        Ok(Self { record, dir, task: TaskClient::new(client.clone()), sandbox: SandboxClient::new(client) })
    }

    /// What the shim tells of its sandbox.
    pub(super) async fn inspect(&self) -> anyhow::Result<InspectResponse> {
        let answer = self.sandbox.inspect(deadline(), &InspectRequest::new()).await;
        answer.map_err(told(format!("ask about sandbox {}", self.record.id)))
    }

    /// The container called `name`; without a name, the only one, or else the pod's first that is not its pause.
    pub(super) async fn container(&self, name: Option<&str>) -> anyhow::Result<Container> {
        let containers = self.inspect().await?.containers;
        choose(&containers, name, &self.record.id).cloned()
    }
}

fn choose<'a>(containers: &'a [Container], name: Option<&str>, sandbox: &str) -> anyhow::Result<&'a Container> {
    let names = || containers.iter().map(|container| container.id.as_str()).collect::<Vec<_>>().join(", ");
    let candidates: Vec<_> = match name {
        Some(name) => containers.iter().filter(|container| container.id.starts_with(name)).collect(),
        // A pod's first container holds the pod open and often has no programs in it.
        None if containers.len() == 2 => containers.iter().filter(|container| container.id != sandbox).collect(),
        None => containers.iter().collect(),
    };
    let exact = candidates.iter().find(|container| Some(container.id.as_str()) == name);
    match (exact, candidates.as_slice()) {
        (Some(container), _) | (None, [container]) => Ok(container),
        (None, []) => Err(match name {
            Some(name) => anyhow!("no container {name} in sandbox {sandbox}: there are {}", names()),
            None => anyhow!("there is no container in sandbox {sandbox}"),
        }),
        (None, _) => Err(anyhow!("say which container with --container: there are {}", names())),
    }
}

/// The context of any one request.
pub(super) fn deadline() -> ttrpc::context::Context {
    caisson_protocol::deadline(DEADLINE)
}

/// For `map_err`: what was attempted, and the shim's own sentence.
pub(super) fn told(attempt: impl Into<String>) -> impl FnOnce(ttrpc::Error) -> anyhow::Error {
    let attempt = attempt.into();
    move |error| anyhow::Error::new(Status::from(error)).context(attempt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers(ids: &[&str]) -> Vec<Container> {
        ids.iter().map(|id| Container { id: (*id).into(), ..Default::default() }).collect()
    }

    #[test]
    fn the_only_container_needs_no_name() {
        assert_eq!(choose(&containers(&["web"]), None, "web").unwrap().id, "web");
    }

    #[test]
    fn of_a_pod_with_one_workload_that_is_meant() {
        assert_eq!(choose(&containers(&["nginx", "pod"]), None, "pod").unwrap().id, "nginx");
    }

    #[test]
    fn among_several_one_must_be_named() {
        let told = choose(&containers(&["a", "b", "pod"]), None, "pod").unwrap_err().to_string();
        assert_eq!(told, "say which container with --container: there are a, b, pod");
    }

    #[test]
    fn an_exact_name_wins_over_longer_ones() {
        assert_eq!(choose(&containers(&["a", "ab"]), Some("a"), "pod").unwrap().id, "a");
        assert!(choose(&containers(&["ab", "ac"]), Some("a"), "pod").is_err());
    }

    #[test]
    fn an_unknown_name_gets_the_list() {
        let told = choose(&containers(&["a"]), Some("x"), "pod").unwrap_err().to_string();
        assert_eq!(told, "no container x in sandbox pod: there are a");
    }
}
