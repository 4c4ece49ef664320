//! Cloud Hypervisor's API: one method for each thing that is asked of it.

#[cfg(test)]
pub mod fake;
#[cfg(test)]
mod tests;

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    time::Duration,
};

use caisson_protocol::vmm::VmState;
use caisson_vmm_launcher::{Error, Result, http_api::HttpApi};
use hyper::Method;
use serde_json::{Value, json};
use tokio::net::UnixStream;

/// Cloud Hypervisor is ready in some milliseconds, unless the host is very busy.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// A guest with much memory takes its time.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// For a device of the host, all of the guest's memory is pinned.
const ADD_DEADLINE: Duration = Duration::from_secs(60);
/// The guest's memory is written to a disk, or read.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(300);
/// Why a request is refused that there is not: `HttpError::NotFound`, or its status.
const UNKNOWN: &str = "Not Found";
/// Why one is that is made by the wrong method: `HttpError::BadRequest`, or its status.
const NOT_SO: &str = "Bad Request";

/// A connection to one Cloud Hypervisor.
#[derive(Debug)]
pub struct Api(HttpApi);

impl Api {
    /// On `stream`, which Cloud Hypervisor need not have taken yet.
    ///
    /// # Errors
    /// When the connection has ended already.
    pub async fn over(stream: UnixStream) -> Result<Self> {
        HttpApi::over("Cloud Hypervisor", "/api/v1/", stream).await.map(Self)
    }

    /// On `connection`, the launcher's end of a socket that Cloud Hypervisor need not have taken yet.
    ///
    /// # Errors
    /// When it has ended already.
    pub async fn on(connection: OwnedFd) -> Result<Self> {
        let connection = StdUnixStream::from(connection);
        let stream = connection.set_nonblocking(true).and_then(|()| UnixStream::from_std(connection));
        Self::over(stream.map_err(Error::host("use a socket of this program itself"))?).await
    }

    /// Whether it has the request `what`, which is a `PUT`: it is asked to `GET` it, of which nothing comes.
    pub async fn has(&self, what: &str) -> Result<bool> {
        match self.0.get(what).await {
            Err(Error::Hypervisor(words)) if words.contains(UNKNOWN) => Ok(false),
            Err(Error::Hypervisor(words)) if words.contains(NOT_SO) => Ok(true),
            Err(error) => Err(error),
            Ok(_) => Err(Error::Hypervisor(format!("Cloud Hypervisor's GET {what} answers what it should refuse"))),
        }
    }

    /// Waits until it answers; its version.
    pub async fn ping(&self) -> Result<String> {
        let ping = self.0.request(Method::GET, "vmm.ping", None, START_DEADLINE).await?;
        Ok(ping["version"].as_str().unwrap_or_default().to_owned())
    }

    /// Tells it what the VM consists of.
    pub async fn create(&self, configuration: &Value) -> Result<()> {
        self.0.put("vm.create", configuration).await.map(drop)
    }

    /// Makes the VM that a snapshot in `directory` holds, paused; the directory as Cloud Hypervisor sees it. `cards` are
    /// all network cards that the VM has, with their open taps.
    pub async fn restore(&self, directory: &str, cards: Vec<(String, Vec<OwnedFd>)>) -> Result<()> {
        let mut body = json!({ "source_url": format!("file://{directory}") });
        if !cards.is_empty() {
            body["net_fds"] = cards.iter().map(|(id, taps)| json!({ "id": id, "num_fds": taps.len() })).collect();
        }
        let taps = cards.into_iter().flat_map(|(_, taps)| taps).collect();
        self.0.request_with(Method::PUT, "vm.restore", Some(&body), taps, SNAPSHOT_DEADLINE).await.map(drop)
    }

    /// Starts the guest.
    pub async fn boot(&self) -> Result<()> {
        self.0.request(Method::PUT, "vm.boot", None, BOOT_DEADLINE).await.map(drop)
    }

    /// Presses the button by which the guest is asked to end.
    pub async fn press_power_button(&self) -> Result<()> {
        self.0.act("vm.power-button").await.map(drop)
    }

    /// Stops the vCPUs.
    pub async fn pause(&self) -> Result<()> {
        self.0.act("vm.pause").await.map(drop)
    }

    /// Lets stopped vCPUs run.
    pub async fn resume(&self) -> Result<()> {
        self.0.act("vm.resume").await.map(drop)
    }

    /// Writes a paused guest to `directory`, as Cloud Hypervisor sees it.
    pub async fn snapshot(&self, directory: &str) -> Result<()> {
        let body = json!({ "destination_url": format!("file://{directory}") });
        self.0.request(Method::PUT, "vm.snapshot", Some(&body), SNAPSHOT_DEADLINE).await.map(drop)
    }

    /// Gives the guest `vcpus` vCPUs.
    pub async fn resize_vcpus(&self, vcpus: u32) -> Result<()> {
        self.0.put("vm.resize", &json!({ "desired_vcpus": vcpus })).await.map(drop)
    }

    /// Gives the guest `mib` of memory. What it was given before and has not taken yet Cloud Hypervisor refuses to give again.
    pub async fn resize_memory(&self, mib: u64) -> Result<()> {
        let wanted = mib << 20;
        if given(&self.info().await?) == wanted {
            return Ok(());
        }
        self.0.put("vm.resize", &json!({ "desired_ram": wanted })).await.map(drop)
    }

    /// In MiB: how much memory the guest has, with what its balloon is to hold of it.
    pub async fn memory_mib(&self) -> Result<u64> {
        let info = self.info().await?;
        let memory = &info["config"]["memory"];
        let most = bytes(&memory["size"]) + bytes(&memory["hotplug_size"]);
        let has = bytes(&info["memory_actual_size"]) + bytes(&info["config"]["balloon"]["size"]);
        Ok(has.min(most) >> 20)
    }

    /// Has the guest of a VM with a balloon give `mib` of memory to it. Answers how much the balloon holds, in MiB: how much
    /// less the guest has than it was given. What it was given and has not taken yet is not the balloon's, which holds no
    /// more than it was to hold.
    pub async fn resize_balloon(&self, mib: u64) -> Result<u64> {
        let before = bytes(&self.info().await?["config"]["balloon"]["size"]);
        let wanted = mib << 20;
        self.0.put("vm.resize", &json!({ "desired_balloon": wanted })).await?;
        let info = self.info().await?;
        let held = given(&info).saturating_sub(bytes(&info["memory_actual_size"]));
        Ok(held.min(before.max(wanted)) >> 20)
    }

    /// Adds a device to the list of the configuration that it belongs to. A network card comes with its open `taps`.
    /// Answers where the guest finds it, if there is a guest already.
    pub async fn add(&self, list: &str, device: &Value, taps: Vec<OwnedFd>) -> Result<Option<String>> {
        let kind = match list {
            "disks" => "disk",
            "devices" => "device",
            kind => kind,
        };
        let what = format!("vm.add-{kind}");
        let added = self.0.request_with(Method::PUT, &what, Some(device), taps, ADD_DEADLINE).await?;
        Ok(added["bdf"].as_str().map(str::to_owned))
    }

    /// Asks the guest to let go of a device; an event tells when it has.
    pub async fn remove_device(&self, id: &str) -> Result<()> {
        self.0.put("vm.remove-device", &json!({ "id": id })).await.map(drop)
    }

    /// What the VM does: created, running or paused.
    pub async fn state(&self) -> Result<VmState> {
        Ok(match self.info().await?["state"].as_str() {
            Some("Created") => VmState::CREATED,
            Some("Paused") => VmState::PAUSED,
            _ => VmState::RUNNING,
        })
    }

    /// Whether Landlock confines it to its VM's files. One that is too old for that takes the order and does nothing.
    pub async fn is_confined(&self) -> Result<bool> {
        Ok(self.info().await?["config"]["landlock_enable"] == true)
    }

    async fn info(&self) -> Result<Value> {
        self.0.get("vm.info").await
    }

    /// What each device has done, by its id.
    pub async fn counters(&self) -> Result<Value> {
        self.0.get("vm.counters").await
    }
}

/// How much memory the guest was given, in bytes, also if it has not taken it yet.
fn given(info: &Value) -> u64 {
    let memory = &info["config"]["memory"];
    bytes(&memory["size"]) + bytes(&memory["hotplugged_size"])
}

/// None where there is nothing.
fn bytes(told: &Value) -> u64 {
    told.as_u64().unwrap_or_default()
}
