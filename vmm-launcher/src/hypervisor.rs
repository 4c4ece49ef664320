//! What a backend implements: the mechanics of one running hypervisor, and nothing about when they are allowed.

use std::{future::Future, path::Path};

use caisson_protocol::vmm::{
    CapabilitiesResponse, CreateRequest, Device, GuestDevice, ResizeBalloonRequest, ResizeMemoryRequest,
    ResizeVcpusRequest, RestoreRequest, SnapshotRequest, VmState, WaitResponse,
};

use crate::{
    Error, Result,
    console::{Audience, Console},
    outlive::Memory,
};

/// A hypervisor with its VM. Dropping it, or the future of [`Self::create`], ends the VM and everything made for it.
///
/// [`crate::vm::Vm`] calls the methods in an order that makes sense; none of them needs to check that.
/// Those with a body are optional.
pub trait Hypervisor: Send + Sync + Sized + 'static {
    /// As in the binary's name: "qemu".
    const NAME: &'static str;
    /// The executable that is used when a request names none.
    const DEFAULT_PATH: &'static str;

    /// Whether guests' memory can be of huge pages, or why it cannot; `create` then finds `VmConfig.huge_pages`.
    const HUGE_PAGES: std::result::Result<(), &'static str> = Err("the launcher asks for none");

    /// Whether a VM goes on when its launcher is killed, or why it cannot.
    const OUTLIVES_LAUNCHER: std::result::Result<(), &'static str> = Err("the VM ends with its launcher");

    /// The backend's own option keys, for `options`: see [`crate::options::describe`].
    fn options() -> serde_json::Value;

    /// What the hypervisor at `path` can do on this host with the backend's own `options`, which are a TOML table.
    fn capabilities(path: &Path, options: &str) -> impl Future<Output = Result<CapabilitiesResponse>> + Send;

    /// Starts the hypervisor and ends with the VM paused before its first instruction.
    fn create(request: &CreateRequest, audience: Audience) -> impl Future<Output = Result<Created<Self>>> + Send;

    /// Starts the hypervisor and ends with a VM as a snapshot has it, paused.
    fn restore(_request: &RestoreRequest, _audience: Audience) -> impl Future<Output = Result<Created<Self>>> + Send {
        unsupported("restoring a snapshot", Self::NAME)
    }

    /// Lets the vCPUs run for the first time.
    fn boot(&self) -> impl Future<Output = Result<()>> + Send;

    /// Asks the guest to power off, and does not wait until it does.
    fn power_off(&self) -> impl Future<Output = Result<()>> + Send;

    /// Ends the VM by force; [`Self::ended`] tells when it has.
    fn kill(&self);

    /// Answers when the VM has ended for whatever reason and everything made for it is gone. Called once.
    fn ended(&self) -> impl Future<Output = WaitResponse> + Send;

    /// The hypervisor's process.
    fn pid(&self) -> u32;

    /// The guest's console.
    fn console(&self) -> &Console;

    /// Stops the vCPUs.
    fn pause(&self) -> impl Future<Output = Result<()>> + Send {
        unsupported("pausing", Self::NAME)
    }

    /// Lets stopped vCPUs run.
    fn resume(&self) -> impl Future<Output = Result<()>> + Send {
        unsupported("resuming", Self::NAME)
    }

    /// Adds `device`, which was checked.
    fn attach(&self, _device: &Device) -> impl Future<Output = Result<GuestDevice>> + Send {
        unsupported("attaching a device", Self::NAME)
    }

    /// Takes away the device that was attached as `id`.
    fn detach(&self, _id: &str) -> impl Future<Output = Result<()>> + Send {
        unsupported("detaching a device", Self::NAME)
    }

    /// Writes the paused VM's state to a directory.
    fn snapshot(&self, _request: &SnapshotRequest) -> impl Future<Output = Result<()>> + Send {
        unsupported("a snapshot", Self::NAME)
    }

    /// Answers how many vCPUs there are afterwards.
    fn resize_vcpus(&self, _request: &ResizeVcpusRequest) -> impl Future<Output = Result<u32>> + Send {
        unsupported("changing the number of vCPUs", Self::NAME)
    }

    /// Answers how much memory there is afterwards, in MiB.
    fn resize_memory(&self, _request: &ResizeMemoryRequest) -> impl Future<Output = Result<u64>> + Send {
        unsupported("changing the amount of memory", Self::NAME)
    }

    /// Answers how much memory the balloon holds afterwards, in MiB.
    fn resize_balloon(&self, _request: &ResizeBalloonRequest) -> impl Future<Output = Result<u64>> + Send {
        unsupported("changing the size of a balloon", Self::NAME)
    }

    /// What another launcher needs to adopt this VM, as it is now.
    ///
    /// # Errors
    /// When the VM has ended.
    fn remember(&self) -> Result<Memory> {
        Err(Error::Unsupported(format!("a VM of {} ends with its launcher", Self::NAME)))
    }

    /// Goes on with the VM that another launcher remembers, whose hypervisor runs. Dropping the future ends it.
    fn adopt(_state_dir: &Path, _memory: Memory) -> impl Future<Output = Result<Adopted<Self>>> + Send {
        unsupported("adopting a VM", Self::NAME)
    }

    /// What the hypervisor counts, beyond what every launcher does; Prometheus text format.
    fn metrics(&self) -> impl Future<Output = Result<String>> + Send {
        async { Ok(String::new()) }
    }
}

/// A VM that is paused before its first instruction.
#[derive(Debug)]
pub struct Created<H> {
    /// For everything that follows.
    pub hypervisor: H,
    /// Where the guest finds its devices, in the request's order.
    pub devices: Vec<GuestDevice>,
}

/// A VM of a launcher that was killed.
#[derive(Debug)]
pub struct Adopted<H> {
    /// For everything that follows.
    pub hypervisor: H,
    /// Created, running or paused.
    pub state: VmState,
}

/// What `H` can do on this host with the hypervisor at `path` and with `options`: what it says itself, and what it says by
/// its constants. The default where `path` is empty.
///
/// # Errors
/// When the hypervisor cannot be asked, or the options are none.
pub(crate) async fn capabilities<H: Hypervisor>(path: &str, options: &str) -> Result<CapabilitiesResponse> {
    let path = if path.is_empty() { H::DEFAULT_PATH } else { path };
    let mut told = H::capabilities(Path::new(path), options).await?;
    told.hypervisor_path = program(path).to_owned();
    match H::HUGE_PAGES {
        Ok(()) => told.features.push("huge-pages".into()),
        Err(why) => drop(told.missing.insert("huge-pages".into(), why.into())),
    }
    match H::OUTLIVES_LAUNCHER {
        Ok(()) => told.operations.push("adopt".into()),
        Err(why) => drop(told.missing.insert("adopt".into(), why.into())),
    }
    let none = || "sandboxes are given none of the host's devices, whatever the hypervisor could".into();
    told.missing.entry("cold-plug-vfio".into()).or_insert_with(none);
    Ok(told)
}

/// `path` as others can use it: what is the launcher itself has none.
pub(crate) fn program(path: &str) -> &str {
    if path.starts_with("/proc/") { "" } else { path }
}

async fn unsupported<T>(what: &str, hypervisor: &str) -> Result<T> {
    Err(Error::Unsupported(format!("{what} is not supported with {hypervisor}")))
}
