//! Firecracker's API: one method for each thing that is asked of it.

#[cfg(test)]
pub mod fake;
#[cfg(test)]
mod tests;

use std::time::Duration;

use caisson_protocol::vmm::VmState;
use caisson_vmm_launcher::{
    Error, Result,
    http_api::{DEADLINE, HttpApi},
};
use hyper::Method;
use serde_json::{Value, json};
use tokio::net::UnixStream;

/// The guest's memory is written to a disk, or read.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(300);
/// Why a request is refused whose endpoint there is not: `RequestError::InvalidPathMethod`.
const UNKNOWN: &str = "Invalid request method and/or path";
/// Why one is whose endpoint there is: `RequestError::SerdeJson`.
const NOT_THAT: &str = "deserializing the json body";

/// A connection to one Firecracker.
#[derive(Debug)]
pub struct Api(HttpApi);

/// Where a snapshot is, as Firecracker sees it.
#[derive(Clone, Debug)]
pub struct SnapshotFiles {
    pub state: String,
    pub memory: String,
}

impl Api {
    /// # Errors
    /// When the connection has ended already.
    pub async fn over(stream: UnixStream) -> Result<Self> {
        HttpApi::over("Firecracker", "", stream).await.map(Self)
    }

    /// Has it log only what goes wrong.
    pub async fn log_warnings_only(&self) -> Result<()> {
        self.put("/logger", &json!({ "level": "Warning" })).await
    }

    /// Tells it what the VM consists of: `PUT path body`, in this order. Before the guest starts, and not for a snapshot.
    pub async fn configure(&self, calls: &[(String, Value)]) -> Result<()> {
        for (path, body) in calls {
            self.put(path, body).await?;
        }
        Ok(())
    }

    /// Whether it has the endpoint `path`. It is sent what none takes, so that nothing comes of the question.
    pub async fn has(&self, method: &Method, path: &str) -> Result<bool> {
        // For people the id is in braces, which no id may have.
        let path = path.replace(['{', '}'], "");
        match self.0.request(method.clone(), &path, Some(&json!(0)), DEADLINE).await {
            Err(Error::Hypervisor(words)) if words.contains(UNKNOWN) => Ok(false),
            Err(Error::Hypervisor(words)) if words.contains(NOT_THAT) => Ok(true),
            Err(error) => Err(error),
            Ok(_) => Err(Error::Hypervisor(format!("Firecracker's {method} {path} takes what it should refuse"))),
        }
    }

    /// Its version.
    pub async fn version(&self) -> Result<String> {
        let told = self.0.get("/version").await?;
        Ok(told["firecracker_version"].as_str().unwrap_or_default().to_owned())
    }

    /// What the VM does: created, running or paused.
    pub async fn state(&self) -> Result<VmState> {
        Ok(match self.0.get("/").await?["state"].as_str() {
            Some("Not started") => VmState::CREATED,
            Some("Paused") => VmState::PAUSED,
            _ => VmState::RUNNING,
        })
    }

    /// Whether the guest's memory is of huge pages.
    pub async fn has_huge_pages(&self) -> Result<bool> {
        Ok(self.0.get("/machine-config").await?["huge_pages"] == "2M")
    }

    /// Starts the guest.
    pub async fn start(&self) -> Result<()> {
        self.act("InstanceStart").await
    }

    /// Presses the keys by which a guest is asked to end.
    pub async fn press_ctrl_alt_del(&self) -> Result<()> {
        self.act("SendCtrlAltDel").await
    }

    /// Has it write what it counts.
    pub async fn flush_metrics(&self) -> Result<()> {
        self.act("FlushMetrics").await
    }

    /// Stops the vCPUs.
    pub async fn pause(&self) -> Result<()> {
        self.patch("/vm", &json!({ "state": "Paused" })).await
    }

    /// Lets stopped vCPUs run.
    pub async fn resume(&self) -> Result<()> {
        self.patch("/vm", &json!({ "state": "Resumed" })).await
    }

    /// Puts another file behind the drive `id` of a guest that has started.
    pub async fn change_drive(&self, id: &str, path: &str) -> Result<()> {
        self.patch(&format!("/drives/{id}"), &json!({ "drive_id": id, "path_on_host": path })).await
    }

    /// Gives a running guest `mib` of memory beyond what it started with.
    pub async fn request_memory(&self, mib: u64) -> Result<()> {
        self.patch("/hotplug/memory", &json!({ "requested_size_mib": mib })).await
    }

    /// In MiB: what of [`Self::request_memory`] a running guest has.
    pub async fn added_memory_mib(&self) -> Result<u64> {
        let told = self.0.get("/hotplug/memory").await?;
        let unknown = || Error::Hypervisor(format!("Firecracker does not say what memory was added but {told}"));
        told["plugged_size_mib"].as_u64().ok_or_else(unknown)
    }

    /// Has the guest of a VM with a balloon give `mib` of memory to it.
    pub async fn resize_balloon(&self, mib: u64) -> Result<()> {
        self.patch("/balloon", &json!({ "amount_mib": mib })).await
    }

    /// In MiB: what the balloon holds.
    pub async fn balloon_mib(&self) -> Result<u64> {
        let told = self.0.get("/balloon/statistics").await?;
        let unknown = || Error::Hypervisor(format!("Firecracker does not say what the balloon holds but {told}"));
        told["actual_mib"].as_u64().ok_or_else(unknown)
    }

    /// Writes a paused guest to `files`.
    pub async fn create_snapshot(&self, files: &SnapshotFiles) -> Result<()> {
        let body = json!({ "snapshot_type": "Full", "snapshot_path": files.state, "mem_file_path": files.memory });
        self.0.request(Method::PUT, "/snapshot/create", Some(&body), SNAPSHOT_DEADLINE).await.map(drop)
    }

    /// Makes the guest that `files` hold, paused; `taps` are the names that its network cards' taps have now, by the
    /// card. It must not have been told of anything before.
    pub async fn load_snapshot(&self, files: &SnapshotFiles, taps: &[(String, String)]) -> Result<()> {
        let mut body = json!({
            "snapshot_path": files.state,
            "mem_backend": { "backend_type": "File", "backend_path": files.memory },
            "resume_vm": false,
        });
        // Unknown before 1.12.
        if !taps.is_empty() {
            let tap = |(card, tap): &(String, String)| json!({ "iface_id": card, "host_dev_name": tap });
            body["network_overrides"] = taps.iter().map(tap).collect();
        }
        self.0.request(Method::PUT, "/snapshot/load", Some(&body), SNAPSHOT_DEADLINE).await.map(drop)
    }

    async fn act(&self, action: &str) -> Result<()> {
        self.put("/actions", &json!({ "action_type": action })).await
    }

    async fn put(&self, path: &str, body: &Value) -> Result<()> {
        self.0.put(path, body).await.map(drop)
    }

    async fn patch(&self, path: &str, body: &Value) -> Result<()> {
        self.0.patch(path, body).await.map(drop)
    }
}
