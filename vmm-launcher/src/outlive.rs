//! How a VM outlives its launcher: its processes do not ask to die with it, they are on a list
//! ([`caisson_protocol::processes`]), and a state file says what another launcher needs to go on with them.
//!
//! ```text
//!  Create(state_dir) ─► Lifetime::of ─► each Process writes itself on the list ─► state.json, anew after each change
//!        the launcher is killed; the hypervisor and its helpers go on
//!  Adopt(state_dir) ─► Kept::read ─► Hypervisor::adopt: Process::adopt, sockets by their paths, pipes by /proc
//! ```
//!
//! The directory is none that a hypervisor sees: what is in there decides which processes are ended.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use caisson_protocol::{
    processes::{ProcessId, ProcessList, boot_id, check_owner},
    vmm::{CreateRequest, GuestDevice},
};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::net::UnixStream;

use crate::{Error, Result, hypervisor::Hypervisor};

/// Changes when a launcher of one version cannot read what one of another has written.
const VERSION: u32 = 1;
/// A state has some KiB.
const MAX_STATE: u64 = 1 << 20;

/// How long a VM's processes live.
#[derive(Clone, Debug, Default)]
pub struct Lifetime(Option<Arc<File>>);

impl Lifetime {
    /// Until the launcher ends, however it does.
    pub fn of_launcher() -> Self {
        Self::default()
    }

    /// As `request` has it; with a `state_dir` until somebody ends them.
    ///
    /// # Errors
    /// As [`Self::of_vm`].
    pub fn of(request: &CreateRequest) -> Result<Self> {
        if request.state_dir.is_empty() { Ok(Self::of_launcher()) } else { Self::of_vm(Path::new(&request.state_dir)) }
    }

    /// Until somebody ends them, as the VM that is known in `state_dir`.
    ///
    /// # Errors
    /// When the list of its processes cannot be used.
    pub fn of_vm(state_dir: &Path) -> Result<Self> {
        let list = ProcessList::in_dir(state_dir).open();
        let list = list.map_err(Error::host(format!("open the list of processes in {}", state_dir.display())))?;
        Ok(Self(Some(Arc::new(list))))
    }

    /// The list that each process joins; none when they die with the launcher.
    pub(crate) fn list(&self) -> Option<&File> {
        self.0.as_deref()
    }

    /// Whether the VM goes on when the launcher is killed.
    pub fn is_longer(&self) -> bool {
        self.0.is_some()
    }
}

/// A process that another launcher has started.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Known {
    /// As errors call it.
    pub program: PathBuf,
    pid: u32,
    start_ticks: u64,
}

impl Known {
    /// Process `pid`, which was started from `program` and has not been waited for.
    ///
    /// # Errors
    /// When `/proc` does not tell.
    pub fn new(program: &Path, pid: u32) -> Result<Self> {
        let gone = || Error::Hypervisor(format!("{} (pid {pid}) has ended", program.display()));
        let id = ProcessId::of(pid).ok_or_else(gone)?;
        Ok(Self { program: program.to_owned(), pid, start_ticks: id.start_ticks })
    }

    /// For the kernel.
    pub fn id(&self) -> ProcessId {
        ProcessId { pid: self.pid, start_ticks: self.start_ticks }
    }
}

/// What a backend remembers of its VM for another launcher.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Memory {
    /// The hypervisor.
    pub process: Known,
    /// The console's.
    pub console_log: Option<PathBuf>,
    /// For the backend alone.
    pub own: Value,
}

impl Memory {
    /// [`Self::own`], as the backend knows it.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn own<T: DeserializeOwned>(&self) -> Result<T> {
        let damaged = |error| Error::Invalid(format!("the state of the VM is damaged: {error}"));
        serde_json::from_value(self.own.clone()).map_err(damaged)
    }
}

/// Connects to `socket`, which `process` itself has made where a hostile hypervisor could put another's.
///
/// # Errors
/// When nobody listens there, or somebody else.
pub async fn connect(process: &Known, socket: &Path) -> Result<UnixStream> {
    let connected = async {
        let stream = UnixStream::connect(socket).await?;
        if stream.peer_cred()?.pid() == i32::try_from(process.pid).ok() {
            return Ok(stream);
        }
        Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("process {} does not listen there", process.pid)))
    };
    connected.await.map_err(Error::host(format!("connect to {}", socket.display())))
}

/// The content of `state.json`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Kept {
    version: u32,
    hypervisor: String,
    boot_id: String,
    /// Id and address each, in the request's order.
    devices: Vec<(String, String)>,
    pub(crate) memory: Memory,
}

impl Kept {
    /// The state in `dir` of a VM of `H`.
    ///
    /// # Errors
    /// When there is none, when somebody else could have written it, when it is damaged, or of another hypervisor or of
    /// an earlier start of the host. Nothing was touched then.
    pub(crate) fn read<H: Hypervisor>(dir: &Path) -> Result<Self> {
        let path = state_file(dir);
        let refused = |source| Error::File { what: "state of the VM", path: path.clone(), source };
        let wrong = |why: &str| Error::Invalid(format!("{} cannot be used: {why}", path.display()));
        let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(&path).map_err(refused)?;
        check_owner(&file).map_err(refused)?;
        let mut text = Vec::new();
        file.take(MAX_STATE).read_to_end(&mut text).map_err(refused)?;
        let kept: Self = serde_json::from_slice(&text).map_err(|error| wrong(&format!("it is damaged: {error}")))?;
        if kept.version != VERSION {
            return Err(wrong("a launcher of another version wrote it"));
        }
        if kept.hypervisor != H::NAME {
            return Err(wrong(&format!(
                "its VM is one of {}, and this is the launcher of {}",
                kept.hypervisor,
                H::NAME
            )));
        }
        if kept.boot_id != boot_id().map_err(Error::host("read the host's boot id"))? {
            return Err(wrong("the host was started since"));
        }
        Ok(kept)
    }

    pub(crate) fn devices(&self) -> Vec<GuestDevice> {
        let device = |(id, address): &(String, String)| GuestDevice {
            id: id.clone(),
            address: address.clone(),
            ..Default::default()
        };
        self.devices.iter().map(device).collect()
    }
}

/// Keeps the state file of a VM that outlives its launcher.
#[derive(Debug)]
pub(crate) struct Keeper {
    dir: PathBuf,
    devices: Vec<(String, String)>,
}

impl Keeper {
    /// Of a VM that is to be made.
    ///
    /// # Errors
    /// When the list of its processes cannot be made, and when there is one: there is a VM already.
    pub(crate) fn begin(dir: &Path, run_dir: &Path) -> Result<Self> {
        if !dir.is_absolute() || dir.starts_with(run_dir) {
            return Err(Error::Invalid(format!(
                "state_dir {} is not absolute or is below run_dir, which the hypervisor sees",
                dir.display()
            )));
        }
        match ProcessList::in_dir(dir).create() {
            Ok(_) => Ok(Self { dir: dir.to_owned(), devices: Vec::new() }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Error::Invalid(format!(
                "{} has the VM of another launcher: adopt it, or end it and remove what is there",
                dir.display()
            ))),
            Err(error) => Err(Error::host(format!("list the VM's processes in {}", dir.display()))(error)),
        }
    }

    /// Of an adopted VM.
    pub(crate) fn go_on(dir: &Path, kept: &Kept) -> Self {
        Self { dir: dir.to_owned(), devices: kept.devices.clone() }
    }

    /// The VM was born with `devices`.
    pub(crate) fn born_with(&mut self, devices: &[GuestDevice]) {
        self.devices = devices.iter().map(|device| (device.id.clone(), device.address.clone())).collect();
    }

    /// Writes the file in one step.
    ///
    /// # Errors
    /// When the directory cannot be written, or the VM has just ended.
    pub(crate) fn write<H: Hypervisor>(&self, hypervisor: &H) -> Result<()> {
        let failed = || Error::host(format!("write {}", state_file(&self.dir).display()));
        let kept = Kept {
            version: VERSION,
            hypervisor: H::NAME.to_owned(),
            boot_id: boot_id().map_err(failed())?,
            devices: self.devices.clone(),
            memory: hypervisor.remember()?,
        };
        let new = self.dir.join(".state.json.new");
        let write = || {
            let text = serde_json::to_vec(&kept)?;
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            fs::rename(&new, state_file(&self.dir))
        };
        write().map_err(failed())
    }

    /// The VM has ended with all its processes.
    pub(crate) fn forget(self) {
        let _ = fs::remove_file(state_file(&self.dir));
        ProcessList::in_dir(&self.dir).remove();
    }
}

fn state_file(dir: &Path) -> PathBuf {
    dir.join("state.json")
}
