//! A root filesystem made of disks, for a guest that sees no directory of the host.
//!
//! ```text
//! containerd's layers ─images─► EROFS images ─disks─► /run/caisson/layers/<disk>     ┐ overlayfs
//!                     a sparse disk, or the guest's memory ─► /run/caisson/rootfs/<container>┘
//! ```
//! The layers' images are made once per host ([`image_cache`]) and shown to every container that has the layer. A
//! container's own changes are its own image, or a file system that it writes to, and go with it.

pub mod disks;
pub mod image_cache;

mod images;
mod layers;
mod locks;
mod tool;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use caisson_protocol::{
    config::BlockRootfs as Configuration,
    containerd::api::Mount,
    deadline,
    guest::{AddStorageRequest, RemoveStorageRequest, Storage},
    id::Id,
    paths::{GUEST_ROOTFS_DIR, SandboxDir},
    status::sentence,
    vmm::Device,
};
use protobuf::MessageField;
use tokio::{sync::OnceCell, task::JoinSet};
use tracing::warn;

use crate::{
    Error, Result,
    block::{
        disks::{Disk, Disks},
        image_cache::{Image, ImageCache, OwnDirectory},
        layers::Layers,
    },
    vm::Vm,
};

/// What one sandbox makes disks with.
#[derive(Debug)]
pub struct BlockStore {
    /// Of its virtual machine.
    pub disks: Disks,
    cache: ImageCache,
    writable_mib: u64,
    max_disks: usize,
    sandbox: SandboxDir,
    own: OnceCell<OwnDirectory>,
}

/// One container's root filesystem.
#[derive(Debug)]
pub struct BlockRootfs {
    store: Arc<BlockStore>,
    id: Id,
    /// The topmost first.
    layers: Vec<Arc<Disk>>,
    /// `None`: in the guest's memory.
    writable: Option<Arc<Disk>>,
    /// Files of this container's alone.
    own_files: Vec<PathBuf>,
}

impl BlockStore {
    /// For the sandbox that has `sandbox`.
    pub fn new(configuration: &Configuration, sandbox: &SandboxDir) -> Self {
        let directory = PathBuf::from(&configuration.layer_cache_path);
        Self {
            disks: Disks::default(),
            cache: ImageCache::new(directory, configuration.layer_cache_mib << 20),
            writable_mib: configuration.writable_disk_mib,
            max_disks: configuration.max_disks as usize,
            sandbox: sandbox.clone(),
            own: OnceCell::new(),
        }
    }

    /// Where the sandbox has images of its own while it lives. Two containerds on one host may give two sandboxes the
    /// same name, but not the same shim.
    pub fn own_path(&self) -> PathBuf {
        self.cache.own_path(&self.own_name())
    }

    /// The sandbox has ended and its containers' files are removed: lets others do without its images, and tidies up.
    pub async fn end(&self) {
        self.disks.forget();
        self.cache.tidy().await;
    }

    /// Makes what is missing of the images of a container's root filesystem, and gives it disks for them.
    pub async fn rootfs(self: &Arc<Self>, id: &Id, mounts: &[Mount]) -> Result<BlockRootfs> {
        let store = self.clone();
        let mut rootfs =
            BlockRootfs { store, id: id.clone(), layers: Vec::new(), writable: None, own_files: Vec::new() };
        match self.fill(&mut rootfs, Layers::of(mounts)?).await {
            Ok(()) => Ok(rootfs),
            Err(error) => {
                rootfs.remove(None).await;
                Err(error)
            }
        }
    }

    async fn fill(&self, rootfs: &mut BlockRootfs, layers: Layers) -> Result<()> {
        let Layers { committed, own } = layers;
        let own = own.filter(|own| committed.is_empty() || !is_empty(own));
        let disks_of_its_own = usize::from(own.is_some()) + usize::from(self.writable_mib > 0);
        let groups = grouped(&committed, self.max_disks.saturating_sub(disks_of_its_own).max(1));

        if let Some(own) = own {
            let image = rootfs.own_file("changes.erofs").await?;
            self.cache.with_room(|| images::make_erofs(&own, image.clone())).await?;
            rootfs.layers.push(self.disks.own_layer(image));
        }
        let images = self.images(&rootfs.id, groups).await?;
        rootfs.layers.extend(images.iter().map(|image| self.disks.of_layer(image)));
        if self.writable_mib > 0 {
            let disk = rootfs.own_file("writable.ext4").await?;
            self.cache.with_room(|| images::make_writable(&self.cache, self.writable_mib, &disk)).await?;
            rootfs.writable = Some(self.disks.writable(disk, rootfs.guest_directory()));
        }
        Ok(())
    }

    fn own_name(&self) -> String {
        let name = self.sandbox.path().file_name().unwrap_or_default().to_string_lossy();
        format!("{name}-{}", std::process::id())
    }

    /// The image of each group of layers, made at once where they are missing.
    async fn images(&self, id: &Id, groups: Vec<Vec<PathBuf>>) -> Result<Vec<Arc<Image>>> {
        let mut making = JoinSet::new();
        for (number, group) in groups.into_iter().enumerate() {
            let (cache, scratch) = (self.cache.clone(), self.sandbox.path().join(format!("layers-{id}")));
            making.spawn(async move { (number, images::of_layers(&cache, &group, &scratch).await) });
        }
        let mut images = Vec::new();
        while let Some(made) = making.join_next().await {
            let (number, image) = made.map_err(|error| Error::host("make the images of layers")(error.into()))?;
            images.push((number, image?));
        }
        images.sort_by_key(|(number, _)| *number);
        Ok(images.into_iter().map(|(_, image)| image).collect())
    }
}

impl BlockRootfs {
    /// For the launcher, when the virtual machine is not made yet.
    pub fn devices(&self) -> Vec<Device> {
        self.disks().map(|disk| disk.device()).collect()
    }

    /// Builds the root filesystem in the guest, and says how a container mounts it.
    pub async fn build(&self, vm: &Vm) -> Result<Mount> {
        for disk in self.disks() {
            disk.mount(vm).await?;
        }
        let directory = self.guest_directory();
        if self.writable.is_none() {
            let memory = Storage { driver: "tmpfs".into(), mount_point: directory.clone(), ..Default::default() };
            add(vm, memory, "make room for what the container writes").await?;
        }
        let root = format!("{directory}/root");
        let lower: Vec<_> = self.layers.iter().map(|disk| disk.mount_point.as_str()).collect();
        let overlay = Storage {
            driver: "overlay".into(),
            options: vec![
                format!("lowerdir={}", lower.join(":")),
                format!("upperdir={directory}/upper"),
                format!("workdir={directory}/work"),
            ],
            mount_point: root.clone(),
            ..Default::default()
        };
        add(vm, overlay, "lay the image's layers over one another").await?;
        Ok(Mount {
            type_: "bind".into(),
            source: root,
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        })
    }

    /// Takes all of it away again; `vm` is `None` when it has ended.
    pub async fn remove(self, vm: Option<&Vm>) {
        if let Some(vm) = vm {
            let request = RemoveStorageRequest { mount_point: self.guest_directory(), ..Default::default() };
            if let Err(error) = vm.guest.remove_storage(deadline(vm.request_limit), &request).await {
                warn!(container = %self.id, error = %sentence(&error), "a root filesystem stays in the guest");
            }
        }
        for disk in self.disks() {
            self.store.disks.release(disk, vm).await;
        }
        for file in &self.own_files {
            if let Err(error) = fs::remove_file(file)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                warn!(file = %file.display(), %error, "a container's disk stays until the sandbox ends");
            }
        }
    }

    fn disks(&self) -> impl Iterator<Item = &Arc<Disk>> {
        self.layers.iter().chain(&self.writable)
    }

    fn guest_directory(&self) -> String {
        format!("{GUEST_ROOTFS_DIR}/{}", self.id)
    }

    async fn own_file(&mut self, name: &str) -> Result<PathBuf> {
        let (store, directory) = (self.store.clone(), self.store.own_name());
        let own = store.own.get_or_try_init(|| store.cache.own_directory(&directory)).await?;
        let file = own.path.join(format!("{}-{name}", self.id));
        self.own_files.push(file.clone());
        Ok(file)
    }
}

async fn add(vm: &Vm, storage: Storage, action: &str) -> Result<()> {
    let request = AddStorageRequest { storage: MessageField::some(storage), ..Default::default() };
    let added = vm.guest.add_storage(deadline(vm.request_limit), &request).await;
    added.map(drop).map_err(Error::remote(action))
}

/// One group for each disk, the topmost first: where the layers are too many, the lowest are one.
fn grouped(layers: &[PathBuf], disks: usize) -> Vec<Vec<PathBuf>> {
    let alone = if layers.len() > disks { disks - 1 } else { layers.len() };
    let (above, below) = layers.split_at(alone);
    let mut groups: Vec<_> = above.iter().map(|layer| vec![layer.clone()]).collect();
    if !below.is_empty() {
        groups.push(below.to_vec());
    }
    groups
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn each_layer_is_a_disk_where_there_are_enough() {
        let groups = grouped(&layers(&["/c", "/b", "/a"]), 3);
        assert_eq!(groups, [layers(&["/c"]), layers(&["/b"]), layers(&["/a"])]);
    }

    #[test]
    fn the_lowest_of_too_many_layers_are_one_disk() {
        let groups = grouped(&layers(&["/d", "/c", "/b", "/a"]), 2);
        assert_eq!(groups, [layers(&["/d"]), layers(&["/c", "/b", "/a"])]);
        assert_eq!(grouped(&layers(&["/b", "/a"]), 1), [layers(&["/b", "/a"])]);
    }

    fn store(cache: &Path, sandbox: &str) -> Arc<BlockStore> {
        let configuration = Configuration {
            layer_cache_path: cache.to_str().unwrap().into(),
            layer_cache_mib: 100,
            max_disks: 4,
            writable_disk_mib: 64,
            ..Default::default()
        };
        let id = Id::parse("", sandbox).unwrap();
        Arc::new(BlockStore::new(&configuration, &SandboxDir::of(&id, &id)))
    }

    fn overlay(lower: &Path, upper: &Path) -> [Mount; 1] {
        let options = vec![format!("lowerdir={}", lower.display()), format!("upperdir={}", upper.display())];
        [Mount { type_: "overlay".into(), source: "overlay".into(), options, ..Default::default() }]
    }

    #[tokio::test]
    async fn what_lies_over_the_image_already_is_a_layer_of_its_own_and_goes_with_the_container() {
        let (cache, lower, upper) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(upper.path().join("changed"), "before").unwrap();
        let store = store(cache.path(), "web");
        let id = Id::parse("", "web").unwrap();
        let rootfs = store.rootfs(&id, &overlay(lower.path(), upper.path())).await.unwrap();
        assert_eq!(rootfs.devices().len(), 3);
        assert_eq!(fs::read_dir(store.own_path()).unwrap().count(), 2);
        rootfs.remove(None).await;
        assert_eq!(fs::read_dir(store.own_path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn two_containers_share_the_disks_of_their_image_and_not_what_they_write_to() {
        let (cache, lower, upper) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = store(cache.path(), "pod");
        let (a, b) = (Id::parse("", "a").unwrap(), Id::parse("", "b").unwrap());
        let first = store.rootfs(&a, &overlay(lower.path(), upper.path())).await.unwrap();
        let second = store.rootfs(&b, &overlay(lower.path(), upper.path())).await.unwrap();
        assert!(Arc::ptr_eq(&first.layers[0], &second.layers[0]));
        assert_ne!(first.devices()[1].id, second.devices()[1].id);
    }
}
