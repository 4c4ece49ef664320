//! Bind mounts for a guest that sees no directory of the host: small files and folders are copied into it, and copied
//! again when they change on the host. What cannot be had that way is refused before anything starts.

mod tree;
mod watch;

pub use watch::Watch;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_protocol::{
    deadline,
    guest::{AddStorageRequest, CopyFileRequest, FileKind, RemoveStorageRequest, Storage},
    guest_ttrpc::GuestClient,
    id::Id,
    paths::GUEST_SHARED_DIR,
    status::sentence,
};
use protobuf::MessageField;
use sha2::{Digest, Sha256};
use tokio::{
    task::{AbortHandle, spawn_blocking},
    time::timeout,
};
use tracing::warn;

use crate::{
    Error, Result,
    copies::tree::{MAX_BYTES, MAX_ENTRIES, MAX_FILE_BYTES, Refusal, Source, Tree},
    guest_spec::SharedPath,
    vm::Vm,
};

/// Files that Kubernetes gives every container to write to though it does without what is written.
const WRITABLE_FILES: [&str; 4] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/termination-log"];
/// A part of the path of a Kubernetes volume that begins empty and ends with its pod.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// Memory that a pod's containers share.
const SHARED_MEMORY: &str = "/dev/shm";
/// Where the guest keeps folders that only it has.
const GUEST_LOCAL_DIR: &str = "/run/caisson/local";
/// When a copy that failed is tried again, if nothing changes on the host before.
const RETRY: Duration = Duration::from_secs(5);

/// What a container's bind mounts become, found good.
#[derive(Debug)]
pub struct Plan {
    copied: Vec<Copied>,
    local: Vec<Local>,
}

/// A file or folder of the host with its copy.
#[derive(Debug)]
struct Copied {
    source: PathBuf,
    /// In the guest.
    target: String,
    /// As the copy is.
    tree: Tree,
    /// Why it is not as the host has it, as was told last.
    failure: Option<String>,
}

/// A folder of the guest, which needs none of the host.
#[derive(Debug)]
struct Local {
    folder: String,
    /// Makes it for the first container that has it. Memory that is shared is always there.
    make: Option<CopyFileRequest>,
    target: String,
}

/// A container's bind mounts in the guest; they follow the host's files until the value is dropped.
#[derive(Debug)]
pub struct Copies {
    id: Id,
    following: Option<Following>,
}

#[derive(Debug)]
struct Following(AbortHandle);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Plan {
    /// Looks at what `id` is to have of the host.
    ///
    /// # Errors
    /// When one of `paths` cannot be copied: names it, and what could be.
    pub fn of(id: &Id, paths: &[SharedPath]) -> Result<Self> {
        let mut plan = Self { copied: Vec::new(), local: Vec::new() };
        for path in paths {
            plan.add(id, path).map_err(|refusal| refused(path, &refusal))?;
        }
        Ok(plan)
    }

    fn add(&mut self, id: &Id, path: &SharedPath) -> Result<(), Refusal> {
        let target = format!("{}/mounts/{}", folder(id), path.name);
        if path.destination == Path::new(SHARED_MEMORY) {
            self.local.push(Local { folder: SHARED_MEMORY.into(), make: None, target });
            return Ok(());
        }
        // As a bind mount does: what a link leads to now.
        let source = fs::canonicalize(&path.source)
            .map_err(|source| Refusal::Unreadable { path: path.source.clone(), source })?;
        let tree = Tree::read(&Source::open(&source)?, |_| Ok(()))?;
        let is_volume_of_pod = source.components().any(|part| part.as_os_str() == EMPTY_DIR);
        let folder = format!("{GUEST_LOCAL_DIR}/{}", name_of(&source));
        // Owner and mode are what the pod's `fsGroup` has made of them.
        if let Some(make) = tree.new_directory(folder.clone()).filter(|_| is_volume_of_pod) {
            self.local.push(Local { folder, make: Some(make), target });
        } else if path.read_only
            || (tree.is_file() && WRITABLE_FILES.iter().any(|file| path.destination == Path::new(file)))
        {
            self.copied.push(Copied { source, target, tree: Tree::default(), failure: None });
        } else {
            return Err(Refusal::Unfit(
                "it can be written to, and what is written to a copy does not come back".into(),
            ));
        }
        Ok(())
    }

    /// Makes the copies in the guest. Also what was made before an error is to be removed.
    pub async fn carry_out(self, copies: &mut Copies, vm: &Vm) -> Result<()> {
        let guest = Guest { client: vm.guest.clone(), limit: vm.request_limit };
        for local in &self.local {
            guest.bind(local).await?;
        }
        if self.copied.is_empty() {
            return Ok(());
        }
        let watch = vm.ways.watch.get_or_try_init(|| async { Watch::new() }).await.map_err(Error::host(
            "watch the host's files for changes (the sysctl fs.inotify.max_user_instances limits how many sandboxes may)",
        ))?;
        let mut copied = self.copied;
        for copy in &mut copied {
            copy.update(watch, &guest).await?;
        }
        copies.following = Some(Following(tokio::spawn(follow(copied, watch.clone(), guest)).abort_handle()));
        Ok(())
    }
}

impl Copies {
    /// Those of container `id`, before there are any.
    pub fn none(id: &Id) -> Self {
        Self { id: id.clone(), following: None }
    }

    /// Takes them out of the guest.
    pub async fn remove(self, vm: &Vm) {
        drop(self.following);
        let guest = Guest { client: vm.guest.clone(), limit: vm.request_limit };
        if let Err(error) = guest.remove(folder(&self.id)).await {
            warn!(container = %self.id, error = %sentence(&error), "copies of the host's files stay in the guest");
        }
    }
}

/// Updates the copies whenever something changes on the host, and a while after they could not be.
async fn follow(mut copied: Vec<Copied>, mut watch: Watch, guest: Guest) {
    loop {
        let limit = if copied.iter().any(|copy| copy.failure.is_some()) { RETRY } else { Duration::MAX };
        if let Ok(Err(_)) = timeout(limit, watch.changed()).await {
            return;
        }
        for copy in &mut copied {
            let failure = copy.update(&watch, &guest).await.err().map(|error| sentence(&error));
            if let Some(error) = failure.as_ref().filter(|_| failure != copy.failure) {
                warn!(file = %copy.source.display(), %error, "the guest keeps an older copy");
            }
            copy.failure = failure;
        }
    }
}

impl Copied {
    /// Has the guest do what is missing of the copy.
    async fn update(&mut self, watch: &Watch, guest: &Guest) -> Result<()> {
        let (source, watch, target) = (self.source.clone(), watch.clone(), self.target.clone());
        let old = std::mem::take(&mut self.tree);
        let looked = spawn_blocking(move || {
            let changes = || -> Result<_, Refusal> {
                let source = Source::open(&source)?;
                let mut new = Tree::read(&source, |path| watch.add(path))?;
                Ok((new.changes_from(&old, &source, &target)?, new))
            };
            (changes(), old)
        });
        let (changes, old) = looked.await.map_err(|error| Error::host("look at the host's files")(error.into()))?;
        let sent = match changes {
            Ok((requests, new)) => guest.copy(&requests).await.map(|()| new),
            Err(refusal) => Err(Error::Unsupported(format!("copy {}: {}", self.source.display(), sentence(&refusal)))),
        };
        // After half of the changes the next attempt makes all of them again.
        match sent {
            Ok(new) => self.tree = new,
            Err(error) => {
                self.tree = old;
                return Err(error);
            }
        }
        Ok(())
    }
}

/// The guest, for copies.
struct Guest {
    client: GuestClient,
    limit: Duration,
}

impl Guest {
    async fn copy(&self, requests: &[CopyFileRequest]) -> Result<()> {
        for request in requests {
            let copied = self.client.copy_file(deadline(self.limit), request).await;
            copied.map_err(Error::remote("copy a file of the host into the guest"))?;
        }
        Ok(())
    }

    /// Shows the folder at the target.
    async fn bind(&self, local: &Local) -> Result<()> {
        self.copy(local.make.as_slice()).await?;
        let storage = Storage {
            driver: "bind".into(),
            source: local.folder.clone(),
            mount_point: local.target.clone(),
            ..Default::default()
        };
        let request = AddStorageRequest { storage: MessageField::some(storage), ..Default::default() };
        let bound = self.client.add_storage(deadline(self.limit), &request).await;
        bound.map(drop).map_err(Error::remote(format!("bind {} in the guest", local.folder)))
    }

    /// First what is mounted, so that nothing is removed through a mount.
    async fn remove(&self, folder: String) -> Result<()> {
        let request = RemoveStorageRequest { mount_point: folder.clone(), ..Default::default() };
        let unmounted = self.client.remove_storage(deadline(self.limit), &request).await;
        unmounted.map_err(Error::remote("unmount the container's folders"))?;
        self.copy(&[CopyFileRequest { path: folder, kind: FileKind::NOTHING.into(), ..Default::default() }]).await
    }
}

fn folder(id: &Id) -> String {
    format!("{GUEST_SHARED_DIR}/{id}")
}

/// The same for every container of the pod.
fn name_of(source: &Path) -> String {
    let digest = Sha256::digest(source.as_os_str().as_encoded_bytes());
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn refused(path: &SharedPath, refusal: &Refusal) -> Error {
    Error::Unsupported(format!(
        "mount {} at {}: {}; a guest without shared_fs gets read-only copies of at most {MAX_ENTRIES} files, {} MiB each \
         and {} MiB together; mount less, or choose a configuration with shared_fs = \"virtio-fs\"",
        path.source.display(),
        path.destination.display(),
        sentence(refusal),
        MAX_FILE_BYTES >> 20,
        MAX_BYTES >> 20,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn path(source: &Path, destination: &str, read_only: bool) -> SharedPath {
        let (source, destination) = (source.to_owned(), destination.into());
        SharedPath { source, destination, name: "0".into(), recursive: true, read_only }
    }

    fn plan(path: SharedPath) -> Result<Plan> {
        Plan::of(&Id::parse("", "web").unwrap(), &[path])
    }

    #[test]
    fn a_read_only_folder_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(path(dir.path(), "/config", true)).unwrap();
        assert_eq!(plan.copied[0].target, "/run/caisson/shared/web/mounts/0");
    }

    #[test]
    fn a_writable_folder_is_refused_with_the_mount_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = plan(path(dir.path(), "/data", false)).unwrap_err().to_string();
        let begin = format!("mount {} at /data: it can be written to", dir.path().display());
        assert!(error.starts_with(&begin) && error.contains("shared_fs = \"virtio-fs\""), "{error}");
    }

    #[test]
    fn a_hosts_file_that_can_be_written_to_is_copied() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(plan(path(file.path(), "/etc/hosts", false)).unwrap().copied.len(), 1);
        assert!(plan(path(file.path(), "/data/file", false)).is_err());
    }

    #[test]
    fn an_empty_volume_of_the_pod_is_a_folder_of_the_guest_with_the_hosts_mode() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("pods/7/volumes/kubernetes.io~empty-dir/cache");
        fs::create_dir_all(&volume).unwrap();
        // As the kubelet does for a pod's fsGroup.
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o2770)).unwrap();
        let plan = plan(path(&volume, "/cache", false)).unwrap();
        let [Local { folder, make: Some(make), .. }] = &plan.local[..] else { panic!("{plan:?}") };
        assert!(folder.starts_with("/run/caisson/local/") && make.path == *folder, "{plan:?}");
        assert_eq!((make.kind.unwrap(), make.mode), (FileKind::NEW_DIRECTORY, 0o2770));
        assert_eq!((make.uid, make.gid), (volume.metadata().unwrap().uid(), volume.metadata().unwrap().gid()));
    }

    #[test]
    fn shared_memory_is_the_guests() {
        let plan = plan(path(Path::new("/run/sandbox/shm"), "/dev/shm", false)).unwrap();
        assert_eq!(plan.local[0].folder, "/dev/shm");
    }

    #[test]
    fn a_link_is_followed_as_a_bind_mount_does() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("real"), "x").unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
        let plan = plan(path(&dir.path().join("link"), "/config", true)).unwrap();
        assert_eq!(plan.copied[0].source, fs::canonicalize(dir.path().join("real")).unwrap());
    }
}
