//! The disks of one sandbox: which image is behind each, where the guest has it mounted, and who uses it.
//!
//! A disk of the virtual machine's birth stays as long as the machine; one that was attached later goes with the last
//! container that uses it.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use caisson_protocol::{
    deadline,
    guest::{AddStorageRequest, RemoveStorageRequest, Storage},
    paths::GUEST_LAYERS_DIR,
    status::{Code, Status, sentence},
    vmm::{AttachRequest, Block, DetachRequest, Device, GuestDevice, device::Kind},
};
use protobuf::MessageField;
use tokio::sync::OnceCell;
use tracing::warn;

use crate::{
    Error, Result,
    block::image_cache::Image,
    process::lock,
    vm::{REQUEST_DEADLINE, Vm},
};

/// All disks of a sandbox.
#[derive(Debug, Default)]
pub struct Disks {
    /// By the path of the image.
    used: Mutex<HashMap<PathBuf, Used>>,
    next: AtomicU32,
}

#[derive(Debug)]
struct Used {
    disk: Arc<Disk>,
    containers: usize,
}

/// One disk.
#[derive(Debug)]
pub struct Disk {
    id: String,
    path: PathBuf,
    read_only: bool,
    /// Unless it is one container's own.
    shared: Option<Arc<Image>>,
    /// In the guest.
    pub mount_point: String,
    /// Known when the virtual machine has it.
    place: OnceCell<Place>,
    mounted: OnceCell<()>,
}

#[derive(Debug)]
struct Place {
    /// Where the guest finds the disk.
    address: String,
    /// Whether the virtual machine was born with it.
    from_birth: bool,
}

impl Disks {
    /// A disk that shows `image`, for one more container.
    pub fn of_layer(&self, image: &Arc<Image>) -> Arc<Disk> {
        let mut used = lock(&self.used);
        let used = used.entry(image.path.clone()).or_insert_with(|| {
            let id = self.new_id();
            let mount_point = layer_mount_point(&id);
            let (path, shared) = (image.path.clone(), Some(image.clone()));
            Used { disk: Disk::new(id, path, true, shared, mount_point), containers: 0 }
        });
        used.containers += 1;
        used.disk.clone()
    }

    /// A disk that shows the image `path`, which is one container's own.
    pub fn own_layer(&self, path: PathBuf) -> Arc<Disk> {
        let id = self.new_id();
        let mount_point = layer_mount_point(&id);
        self.own(Disk::new(id, path, true, None, mount_point))
    }

    /// The disk `path` that one container writes to, mounted in the guest at `mount_point`.
    pub fn writable(&self, path: PathBuf, mount_point: String) -> Arc<Disk> {
        self.own(Disk::new(self.new_id(), path, false, None, mount_point))
    }

    fn own(&self, disk: Arc<Disk>) -> Arc<Disk> {
        lock(&self.used).insert(disk.path.clone(), Used { disk: disk.clone(), containers: 1 });
        disk
    }

    /// Says where the guest finds the disks that the virtual machine was born with.
    pub fn place(&self, devices: &[GuestDevice]) {
        for used in lock(&self.used).values() {
            if let Some(device) = devices.iter().find(|device| device.id == used.disk.id) {
                // A disk has one place.
                let _ = used.disk.place.set(Place { address: device.address.clone(), from_birth: true });
            }
        }
    }

    /// A container needs `disk` no more; the last one takes it out of the guest and the virtual machine, which is
    /// `None` when it has ended.
    pub async fn release(&self, disk: &Arc<Disk>, vm: Option<&Vm>) {
        let last = {
            let mut all = lock(&self.used);
            let Some(used) = all.get_mut(&disk.path).filter(|used| Arc::ptr_eq(&used.disk, disk)) else { return };
            used.containers = used.containers.saturating_sub(1);
            let last = used.containers == 0;
            if last && !disk.stays() {
                all.remove(&disk.path);
            }
            last
        };
        if let Some(vm) = vm.filter(|_| last)
            && let Err(error) = disk.remove(vm).await
        {
            warn!(disk = disk.id, error = %sentence(&error), "a disk stays in the virtual machine");
        }
    }

    /// Lets go of all images: nobody needs the disks any more.
    pub fn forget(&self) {
        lock(&self.used).clear();
    }

    fn new_id(&self) -> String {
        format!("disk-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }
}

impl Disk {
    fn new(id: String, path: PathBuf, read_only: bool, shared: Option<Arc<Image>>, mount_point: String) -> Arc<Self> {
        let (place, mounted) = Default::default();
        Arc::new(Self { id, path, read_only, shared, mount_point, place, mounted })
    }

    /// For the launcher.
    pub fn device(&self) -> Device {
        let block =
            Block { path: self.path.to_string_lossy().into_owned(), read_only: self.read_only, ..Default::default() };
        Device { id: self.id.clone(), kind: Some(Kind::Block(block)), ..Default::default() }
    }

    /// Attaches the disk unless the virtual machine has it, and mounts it unless the guest has.
    pub async fn mount(&self, vm: &Vm) -> Result<()> {
        let Place { address, .. } = self.place.get_or_try_init(|| self.attach(vm)).await?;
        let mount = || async {
            let (fstype, options) = if self.read_only { ("erofs", vec!["ro".into()]) } else { ("ext4", Vec::new()) };
            let storage = Storage {
                driver: "block".into(),
                source: address.clone(),
                fstype: fstype.into(),
                options,
                mount_point: self.mount_point.clone(),
                ..Default::default()
            };
            let request = AddStorageRequest { storage: MessageField::some(storage), ..Default::default() };
            let added = vm.guest.add_storage(deadline(vm.request_limit), &request).await;
            added.map(drop).map_err(Error::remote(format!("mount {} in the guest", self.path.display())))
        };
        self.mounted.get_or_try_init(mount).await.copied()
    }

    async fn attach(&self, vm: &Vm) -> Result<Place> {
        let request = AttachRequest { device: MessageField::some(self.device()), ..Default::default() };
        let attached = vm.launcher().client.attach(deadline(REQUEST_DEADLINE), &request).await.map_err(Status::from);
        let attached = attached.map_err(|mut status| {
            if status.code == Code::UNIMPLEMENTED {
                status.message.push_str(
                    "; a container that comes later must have its image's layers in common with the first one, or \
                     share the host's directory (rootfs = \"virtio-fs\" in the configuration)",
                );
            }
            Error::Remote { context: format!("add the disk {}: ", self.path.display()), status }
        })?;
        Ok(Place { address: attached.device.unwrap_or_default().address, from_birth: false })
    }

    async fn remove(&self, vm: &Vm) -> Result<()> {
        if self.stays() {
            return Ok(());
        }
        if self.mounted.initialized() {
            let request = RemoveStorageRequest { mount_point: self.mount_point.clone(), ..Default::default() };
            let removed = vm.guest.remove_storage(deadline(vm.request_limit), &request).await;
            removed.map_err(Error::remote(format!("unmount {} in the guest", self.path.display())))?;
        }
        if self.place.get().is_some_and(|place| !place.from_birth) {
            let request = DetachRequest { id: self.id.clone(), ..Default::default() };
            let detached = vm.launcher().client.detach(deadline(REQUEST_DEADLINE), &request).await;
            detached.map_err(Error::remote(format!("take the disk {} away", self.path.display())))?;
        }
        Ok(())
    }

    /// Whether it is kept for a later container: what the virtual machine was born with cannot be taken away.
    fn stays(&self) -> bool {
        self.shared.is_some() && self.place.get().is_some_and(|place| place.from_birth)
    }
}

fn layer_mount_point(id: &str) -> String {
    format!("{GUEST_LAYERS_DIR}/{id}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::image_cache::ImageCache;

    async fn image(cache: &ImageCache, name: &str) -> Arc<Image> {
        let make = |path| async move { std::fs::write(path, "image").map_err(Error::host("write")) };
        cache.get(name, make).await.unwrap()
    }

    #[tokio::test]
    async fn containers_share_the_disk_of_a_layer_until_the_last_one_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, disks) = (ImageCache::new(dir.path().into(), 1 << 20), Disks::default());
        let image = image(&cache, "a").await;
        let (first, second) = (disks.of_layer(&image), disks.of_layer(&image));
        assert!(Arc::ptr_eq(&first, &second));
        disks.release(&first, None).await;
        assert!(Arc::ptr_eq(&first, &disks.of_layer(&image)));
        disks.release(&first, None).await;
        disks.release(&second, None).await;
        assert!(!Arc::ptr_eq(&first, &disks.of_layer(&image)));
    }

    #[tokio::test]
    async fn a_layer_of_the_birth_stays_for_a_later_container() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, disks) = (ImageCache::new(dir.path().into(), 1 << 20), Disks::default());
        let image = image(&cache, "a").await;
        let disk = disks.of_layer(&image);
        disks.place(&[GuestDevice { id: "disk-0".into(), address: "serial:disk-0".into(), ..Default::default() }]);
        disks.release(&disk, None).await;
        assert!(Arc::ptr_eq(&disk, &disks.of_layer(&image)));
    }

    #[test]
    fn a_layer_is_read_only_and_another_disk_is_not() {
        let read_only = |disk: &Disk| match disk.device().kind {
            Some(Kind::Block(block)) => block.read_only,
            _ => panic!("not a disk"),
        };
        let disks = Disks::default();
        assert!(read_only(&disks.own_layer("/own/web-changes.erofs".into())));
        assert!(!read_only(&disks.writable("/own/web-writable.ext4".into(), "/run/caisson/rootfs/web".into())));
    }
}
