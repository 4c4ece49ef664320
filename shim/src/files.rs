//! How containers get at the host's files, which is the configuration's choice: a root filesystem and bind mounts
//! through the shared directory ([`crate::share`]), a root filesystem as disks ([`crate::block`]), bind mounts as copies
//! ([`crate::copies`]).

use std::{fs, sync::Arc};

use caisson_protocol::{config::SandboxConfig, containerd::api::Mount, id::Id, paths::SandboxDir, vmm::Device};
use tokio::{
    sync::OnceCell,
    task::{JoinHandle, spawn_blocking},
};

use crate::{
    Error, Result,
    block::{BlockRootfs, BlockStore},
    copies::{Copies, Plan, Watch},
    guest_spec::SharedPath,
    mount::make_shared,
    share::ContainerShare,
    vm::Vm,
};

/// The ways that one sandbox has.
#[derive(Clone, Debug)]
pub struct Ways {
    /// What the sandbox has on the host.
    pub dir: SandboxDir,
    /// Whether the guest sees the shared directory.
    pub shares_directory: bool,
    /// Where root filesystems are disks.
    pub disks: Option<Arc<BlockStore>>,
    /// Tells of changes to the files that were copied; made for the first container that has some.
    pub watch: Arc<OnceCell<Watch>>,
}

/// What one container is to have of the host.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The container.
    pub id: &'a Id,
    /// containerd's description of the root filesystem.
    pub rootfs: &'a [Mount],
    /// The sources of bind mounts.
    pub paths: &'a [SharedPath],
}

/// A container's files while they are made ready on the host, whether or not there is a virtual machine yet.
#[derive(Debug)]
pub struct Preparation {
    /// The sandbox's.
    pub ways: Ways,
    id: Id,
    mounts: Vec<Mount>,
    rootfs: Option<BlockRootfs>,
    share: Option<JoinHandle<Result<ContainerShare>>>,
    plan: Option<Plan>,
}

/// A container's files, until they are removed.
#[derive(Debug)]
pub struct ContainerFiles {
    id: Id,
    rootfs: Option<BlockRootfs>,
    share: Option<ContainerShare>,
    plan: Option<Plan>,
    copies: Option<Copies>,
}

impl Ways {
    /// As `config` says. Makes the directory that the guest shares with the host, if it does.
    pub fn of(config: &SandboxConfig, dir: &SandboxDir) -> Result<Self> {
        let disks = config.block_rootfs.as_ref().map(|configuration| Arc::new(BlockStore::new(configuration, dir)));
        let shares_directory = config.shared_fs.is_some();
        if shares_directory {
            // Mounts that come later appear in it on both sides.
            let shared = dir.shared();
            fs::create_dir_all(&shared).map_err(Error::host(format!("make {}", shared.display())))?;
            make_shared(&shared).map_err(Error::host(format!("share {}", shared.display())))?;
        } else if disks.is_none() {
            return Err(Error::Unsupported(format!(
                "{} gives the guest no root filesystem: neither shared_fs nor rootfs = \"block\" is set",
                config.origin
            )));
        }
        Ok(Self { dir: dir.clone(), shares_directory, disks, watch: Arc::default() })
    }

    /// Begins to make ready what a container wants.
    ///
    /// # Errors
    /// When it cannot be had this way; then nothing has begun.
    pub fn prepare(&self, wanted: Wanted<'_>) -> Result<Preparation> {
        let id = wanted.id.clone();
        let plan = if self.shares_directory { None } else { Some(Plan::of(&id, wanted.paths)?) };
        let share = self.shares_directory.then(|| {
            let rootfs = if self.disks.is_some() { Vec::new() } else { wanted.rootfs.to_vec() };
            let (dir, id, paths) = (self.dir.clone(), id.clone(), wanted.paths.to_vec());
            spawn_blocking(move || ContainerShare::prepare(&dir, &id, &rootfs, &paths))
        });
        Ok(Preparation { ways: self.clone(), id, mounts: wanted.rootfs.to_vec(), rootfs: None, share, plan })
    }
}

impl Preparation {
    /// Makes the disks of the root filesystem, if it consists of disks; the virtual machine may be born with them.
    pub async fn disks(&mut self) -> Result<Vec<Device>> {
        let Some(store) = &self.ways.disks else { return Ok(Vec::new()) };
        let rootfs = store.rootfs(&self.id, &self.mounts).await?;
        let devices = rootfs.devices();
        self.rootfs = Some(rootfs);
        Ok(devices)
    }

    /// Waits for the rest. To be called in any case: nothing may be mounted later.
    pub async fn finish(self) -> Result<ContainerFiles> {
        let share = match self.share {
            Some(share) => {
                Some(share.await.unwrap_or_else(|error| Err(Error::host("mount the root filesystem")(error.into()))))
            }
            None => None,
        };
        let (share, failed) = match share.transpose() {
            Ok(share) => (share, None),
            Err(error) => (None, Some(error)),
        };
        let files = ContainerFiles { id: self.id, rootfs: self.rootfs, share, plan: self.plan, copies: None };
        let Some(error) = failed else { return Ok(files) };
        files.remove(None).await;
        Err(error)
    }
}

impl ContainerFiles {
    /// Brings them into the guest, and says how the guest mounts the root filesystem. After an error too they are to be
    /// removed.
    pub async fn enter(&mut self, vm: &Vm) -> Result<Mount> {
        if let Some(plan) = self.plan.take() {
            plan.carry_out(self.copies.insert(Copies::none(&self.id)), vm).await?;
        }
        match &self.rootfs {
            Some(rootfs) => rootfs.build(vm).await,
            None => Ok(ContainerShare::guest_rootfs(&self.id)),
        }
    }

    /// Takes them out of the guest, unless `vm` is `None` because that has ended, and removes them from the host.
    pub async fn remove(self, vm: Option<&Vm>) {
        if let (Some(copies), Some(vm)) = (self.copies, vm) {
            copies.remove(vm).await;
        }
        if let Some(rootfs) = self.rootfs {
            rootfs.remove(vm).await;
        }
        // Unmounting waits for the kernel. A panic there has been printed.
        let _ = spawn_blocking(move || drop(self.share)).await;
    }
}
