//! Cloud Hypervisor's API: one method for each thing that is asked of it.

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    time::Duration,
};

use caisson_vmm_launcher::{
    Error, Result,
    http_api::{DEADLINE, HttpApi},
};
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
        HttpApi::over("Cloud Hypervisor", stream).await.map(Self)
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
        match self.request(Method::GET, what, None, DEADLINE).await {
            Err(Error::Hypervisor(words)) if words.contains(UNKNOWN) => Ok(false),
            Err(Error::Hypervisor(words)) if words.contains(NOT_SO) => Ok(true),
            Err(error) => Err(error),
            Ok(_) => Err(Error::Hypervisor(format!("Cloud Hypervisor's GET {what} answers what it should refuse"))),
        }
    }

    /// Waits until it answers; its version.
    pub async fn ping(&self) -> Result<String> {
        let ping = self.request(Method::GET, "vmm.ping", None, START_DEADLINE).await?;
        Ok(ping["version"].as_str().unwrap_or_default().to_owned())
    }

    /// Tells it what the VM consists of.
    pub async fn create(&self, configuration: &Value) -> Result<()> {
        self.put("vm.create", configuration).await
    }

    /// Makes the VM that a snapshot in `directory` holds, paused; the directory as Cloud Hypervisor sees it. `cards` are
    /// all network cards that the VM has, with their open taps.
    pub async fn restore(&self, directory: &str, cards: Vec<(String, Vec<OwnedFd>)>) -> Result<()> {
        let mut body = json!({ "source_url": format!("file://{directory}") });
        if !cards.is_empty() {
            body["net_fds"] = cards.iter().map(|(id, taps)| json!({ "id": id, "num_fds": taps.len() })).collect();
        }
        let taps = cards.into_iter().flat_map(|(_, taps)| taps).collect();
        self.request_with(Method::PUT, "vm.restore", Some(&body), taps, SNAPSHOT_DEADLINE).await.map(drop)
    }

    /// Starts the guest.
    pub async fn boot(&self) -> Result<()> {
        self.request(Method::PUT, "vm.boot", None, BOOT_DEADLINE).await.map(drop)
    }

    /// Presses the button by which the guest is asked to end.
    pub async fn press_power_button(&self) -> Result<()> {
        self.act("vm.power-button").await
    }

    /// Stops the vCPUs.
    pub async fn pause(&self) -> Result<()> {
        self.act("vm.pause").await
    }

    /// Lets stopped vCPUs run.
    pub async fn resume(&self) -> Result<()> {
        self.act("vm.resume").await
    }

    /// Writes a paused guest to `directory`, as Cloud Hypervisor sees it.
    pub async fn snapshot(&self, directory: &str) -> Result<()> {
        let body = json!({ "destination_url": format!("file://{directory}") });
        self.request(Method::PUT, "vm.snapshot", Some(&body), SNAPSHOT_DEADLINE).await.map(drop)
    }

    /// Gives the guest `vcpus` vCPUs.
    pub async fn resize_vcpus(&self, vcpus: u32) -> Result<()> {
        self.put("vm.resize", &json!({ "desired_vcpus": vcpus })).await
    }

    /// Gives the guest `mib` of memory.
    pub async fn resize_memory(&self, mib: u64) -> Result<()> {
        self.put("vm.resize", &json!({ "desired_ram": mib << 20 })).await
    }

    /// Has the guest of a VM with a balloon give `mib` of memory to it.
    pub async fn resize_balloon(&self, mib: u64) -> Result<()> {
        self.put("vm.resize", &json!({ "desired_balloon": mib << 20 })).await
    }

    /// In MiB: what the balloon holds: how much less the guest has than it was given.
    pub async fn balloon_mib(&self) -> Result<u64> {
        let info = self.info().await?;
        let held = info["config"]["memory"]["size"].as_u64().zip(info["memory_actual_size"].as_u64());
        let held = held.and_then(|(given, has)| given.checked_sub(has)).map(|bytes| bytes >> 20);
        held.ok_or_else(|| Error::Hypervisor("Cloud Hypervisor does not say what the balloon holds".into()))
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
        let added = self.request_with(Method::PUT, &what, Some(device), taps, ADD_DEADLINE).await?;
        Ok(added["bdf"].as_str().map(str::to_owned))
    }

    /// Asks the guest to let go of a device; an event tells when it has.
    pub async fn remove_device(&self, id: &str) -> Result<()> {
        self.put("vm.remove-device", &json!({ "id": id })).await
    }

    /// What the VM does: `Created`, `Running`, `Paused` or `Shutdown`.
    pub async fn state(&self) -> Result<String> {
        Ok(self.info().await?["state"].as_str().unwrap_or_default().to_owned())
    }

    async fn info(&self) -> Result<Value> {
        self.request(Method::GET, "vm.info", None, DEADLINE).await
    }

    /// What each device has done, by its id.
    pub async fn counters(&self) -> Result<Value> {
        self.request(Method::GET, "vm.counters", None, DEADLINE).await
    }

    async fn act(&self, what: &str) -> Result<()> {
        self.request(Method::PUT, what, None, DEADLINE).await.map(drop)
    }

    async fn put(&self, what: &str, body: &Value) -> Result<()> {
        self.request(Method::PUT, what, Some(body), DEADLINE).await.map(drop)
    }

    async fn request(&self, method: Method, what: &str, body: Option<&Value>, limit: Duration) -> Result<Value> {
        self.request_with(method, what, body, Vec::new(), limit).await
    }

    async fn request_with(
        &self,
        method: Method,
        what: &str,
        body: Option<&Value>,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Value> {
        self.0.request_with(method, &format!("/api/v1/{what}"), body, descriptors, limit).await
    }
}
