//! Devices that come and go while the VM runs. It keeps no state of the VM; what it remembers is what each device has on
//! the host's side.
//!
//! ```text
//!  attach: an entry ─► what it needs on the host ─► vm.add-…
//!  detach: vm.remove-device … the guest lets go, sooner or later ─► event ─► its host side ends ─► no entry
//! ```

use std::{
    collections::HashMap,
    mem,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use caisson_protocol::{
    status::sentence,
    vmm::{Device, GuestDevice, VmState, device::Kind},
};
use caisson_vmm_launcher::{
    Error, Result, jail,
    outlive::{Known, Lifetime},
    vfio::{self, HostDevice},
    virtiofsd::{self, Virtiofsd},
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Mutex, watch},
    time::timeout,
};
use tracing::warn;

use crate::{
    api::Api,
    configuration::{self, hotpluggable, taps},
    events::Removed,
    layout::{self, RunDir},
};

/// A guest without a working driver never lets go of a device.
const DETACH_DEADLINE: Duration = Duration::from_secs(20);

/// The attached devices of one VM.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The VM's process.
    jailed: u32,
    /// By the device's id, from before it is attached until after it was detached.
    host_sides: Arc<watch::Sender<HashMap<String, HostSide>>>,
    /// Whoever shows something to Cloud Hypervisor or hides it has this: devices of one IOMMU group share it.
    jail: Arc<Mutex<()>>,
}

/// Where a VM is on the host.
#[derive(Debug)]
pub struct Host<'a> {
    pub run_dir: &'a RunDir,
    pub lifetime: &'a Lifetime,
}

/// What a device has on the host's side.
#[derive(Debug, Default)]
struct HostSide {
    /// Where Cloud Hypervisor sees its files.
    shown: Vec<PathBuf>,
    file_server: Option<Virtiofsd>,
}

/// [`HostSide`] for another launcher.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct KnownHostSide {
    shown: Vec<PathBuf>,
    /// With the share's name.
    file_server: Option<(String, Known)>,
}

impl Attached {
    /// Those of a new VM, which is process `jailed`; its guest lets go of `removed`.
    pub fn new(jailed: u32, removed: Removed) -> Self {
        Self::adopt(jailed, HashMap::new(), removed)
    }

    /// Those of an adopted VM. A file server that has ended may be one of a device that is gone.
    pub fn adopt(jailed: u32, known: HashMap<String, KnownHostSide>, removed: Removed) -> Self {
        let adopt = |(id, KnownHostSide { shown, file_server })| {
            let file_server = file_server.and_then(|(tag, known)| {
                let adopted = Virtiofsd::adopt(&tag, &known);
                adopted.inspect_err(|error| warn!(tag, error = sentence(error), "a share has no file server")).ok()
            });
            (id, HostSide { shown, file_server })
        };
        let host_sides = Arc::new(watch::Sender::new(known.into_iter().map(adopt).collect()));
        let attached = Self { jailed, host_sides, jail: Arc::default() };
        tokio::spawn(attached.clone().end_removed(removed));
        attached
    }

    /// What another launcher needs to know of them.
    pub fn known(&self) -> HashMap<String, KnownHostSide> {
        let known = |(id, host_side): (&String, &HostSide)| {
            let file_server = host_side.file_server.as_ref().map(Virtiofsd::known);
            (id.clone(), KnownHostSide { shown: host_side.shown.clone(), file_server })
        };
        self.host_sides.borrow().iter().map(known).collect()
    }

    /// Adds `device` to the VM, and answers where the guest finds it.
    pub async fn attach(&self, device: &Device, host: &Host<'_>, api: &Api) -> Result<GuestDevice> {
        let listed = hotpluggable(device)?;
        self.begin(&device.id)?;
        let place = match self.add(device, listed, host, api).await {
            Ok(place) => place,
            Err(refusal) => {
                self.end(&device.id).await?;
                return Err(refusal);
            }
        };
        let address = match (&device.kind, place) {
            (Some(Kind::Vfio(_)), Some(place)) => format!("pci:{place}"),
            _ => configuration::address(device, &host.run_dir.path(""))?,
        };
        Ok(GuestDevice { id: device.id.clone(), address, ..Default::default() })
    }

    /// Takes the device away that was attached as `id`, once the guest has let go of it.
    ///
    /// # Errors
    /// When there is none; when the guest does not let go of it in time, which it may do later.
    pub async fn detach(&self, id: &str, api: &Api) -> Result<()> {
        if !self.host_sides.borrow().contains_key(id) {
            return Err(Error::Invalid(format!(
                "no device was attached as \"{}\" while the VM ran",
                id.escape_debug()
            )));
        }
        let mut changes = self.host_sides.subscribe();
        let has_guest = api.state().await? != VmState::CREATED;
        api.remove_device(id).await?;
        if !has_guest {
            // Nobody has to let go of it, and no event tells.
            return self.end(id).await;
        }
        let gone = changes.wait_for(|host_sides| !host_sides.contains_key(id));
        let gone = timeout(DETACH_DEADLINE, gone).await.map(drop);
        gone.map_err(|_| {
            let seconds = DETACH_DEADLINE.as_secs();
            Error::Hypervisor(format!("the guest did not let go of device \"{id}\" within {seconds} s"))
        })
    }

    /// Answers with the words of the first file server that fails; never when none does.
    pub async fn failed(&self) -> String {
        let mut changes = self.host_sides.subscribe();
        loop {
            let failure = |host_side: &HostSide| host_side.file_server.as_ref().map(Virtiofsd::failed);
            let failures = changes.borrow_and_update().values().filter_map(failure).collect();
            tokio::select! {
                // One that is ended with its device has not failed.
                biased;
                _ = changes.changed() => {}
                words = virtiofsd::first(failures) => return words,
            }
        }
    }

    /// The VM has ended: its devices' file servers end, and nothing is left to take away from it.
    pub async fn end_all(&self) {
        let host_sides = self.host_sides.send_replace(HashMap::new());
        for file_server in host_sides.into_values().filter_map(|host_side| host_side.file_server) {
            file_server.end().await;
        }
    }

    async fn end_removed(self, mut removed: Removed) {
        while let Some(id) = removed.recv().await {
            if let Err(error) = self.end(&id).await {
                warn!(id, error = sentence(&error), "what a device had on the host is not all gone");
            }
        }
    }

    fn begin(&self, id: &str) -> Result<()> {
        let new = self.host_sides.send_if_modified(|host_sides| {
            let new = !host_sides.contains_key(id);
            host_sides.entry(id.to_owned()).or_default();
            new
        });
        if new { Ok(()) } else { Err(Error::Invalid(format!("the VM has a device \"{id}\" already"))) }
    }

    async fn add(
        &self,
        device: &Device,
        (list, body): (&str, serde_json::Value),
        host: &Host<'_>,
        api: &Api,
    ) -> Result<Option<String>> {
        let taps = taps(device)?;
        let file_server = self.prepare(device, host).await?;
        let added = tokio::select! {
            // Cloud Hypervisor would try to reach it for a minute.
            biased;
            words = virtiofsd::first(file_server.iter().map(Virtiofsd::failed).collect()) => Err(Error::Hypervisor(words)),
            added = api.add(list, &body, taps) => added,
        };
        match (&added, file_server) {
            (Ok(_), file_server) => self.change(&device.id, |host_side| host_side.file_server = file_server),
            (Err(_), Some(file_server)) => file_server.end().await,
            (Err(_), None) => {}
        }
        added
    }

    /// Makes what `device` needs on the host.
    async fn prepare(&self, device: &Device, host: &Host<'_>) -> Result<Option<Virtiofsd>> {
        let id = device.id.as_str();
        match &device.kind {
            Some(Kind::Block(block)) => self.show(id, &block.path, layout::disk(id), !block.read_only).await?,
            Some(Kind::Pmem(pmem)) => self.show(id, &pmem.path, layout::disk(id), !pmem.read_only).await?,
            Some(Kind::Vfio(vfio)) => {
                let device = HostDevice::find(&vfio.address)?;
                vfio::let_pin_memory(self.jailed)?;
                self.show(id, &device.sysfs, layout::host_device(&device.address), false).await?;
                // The group is where it is on the host.
                self.show(id, &device.group, &device.group, true).await?;
            }
            Some(Kind::Fs(fs)) => {
                return Virtiofsd::listen(fs, &host.run_dir.fs_socket(id), host.lifetime).map(Some);
            }
            _ => {}
        }
        Ok(None)
    }

    /// Shows `outside` to Cloud Hypervisor for the device `id`, unless another one has it at `inside` already.
    async fn show(
        &self,
        id: &str,
        outside: impl AsRef<Path>,
        inside: impl Into<PathBuf>,
        writable: bool,
    ) -> Result<()> {
        let inside = inside.into();
        let _turn = self.jail.lock().await;
        if !self.shows(&inside) {
            jail::show(self.jailed, outside.as_ref(), &inside, writable).await?;
        }
        self.change(id, |host_side| host_side.shown.push(inside));
        Ok(())
    }

    /// Ends what the device `id` has on the host, and what is known of it.
    async fn end(&self, id: &str) -> Result<()> {
        let _turn = self.jail.lock().await;
        let HostSide { shown, file_server } = self.take(id);
        if let Some(file_server) = file_server {
            file_server.end().await;
        }
        let mut ended = Ok(());
        for inside in shown {
            ended = ended.and(jail::hide(self.jailed, &inside).await);
        }
        self.host_sides.send_modify(|host_sides| drop(host_sides.remove(id)));
        ended
    }

    /// What the device `id` alone has.
    fn take(&self, id: &str) -> HostSide {
        let mut taken = HostSide::default();
        self.change(id, |host_side| taken = mem::take(host_side));
        taken.shown.retain(|inside| !self.shows(inside));
        taken
    }

    fn shows(&self, inside: &Path) -> bool {
        self.host_sides.borrow().values().flat_map(|host_side| &host_side.shown).any(|shown| shown == inside)
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut HostSide)) {
        self.host_sides.send_modify(|host_sides| {
            host_sides.get_mut(id).map(change);
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::api::fake::Fake;

    /// A VM whose disk was attached, and how its guest lets go of things.
    async fn with_disk() -> (Attached, Api, mpsc::Sender<String>) {
        let (guest, removed) = mpsc::channel(1);
        let known = HashMap::from([("disk".to_owned(), KnownHostSide { shown: Vec::new(), file_server: None })]);
        let api = Api::over(Fake::serve()).await.unwrap();
        let vm = serde_json::json!({
            "cpus": { "boot_vcpus": 1, "max_vcpus": 1 },
            "memory": { "size": 256 << 20, "shared": false },
            "payload": { "kernel": "/kernel", "cmdline": "" },
            "console": { "mode": "Off" },
            "serial": { "mode": "Socket", "socket": "/run/serial.sock" },
            "landlock_enable": false,
            "disks": [{ "id": "disk", "path": "/d", "readonly": true, "serial": "disk", "image_type": "Raw" }],
        });
        api.create(&vm).await.unwrap();
        (Attached::adopt(std::process::id(), known, removed), api, guest)
    }

    const GONE: &str = "no device was attached as \"disk\" while the VM ran";

    #[tokio::test]
    async fn a_device_is_gone_when_the_guest_has_let_go_of_it() {
        let (attached, api, guest) = with_disk().await;
        api.boot().await.unwrap();
        let (detached, told) = tokio::join!(attached.detach("disk", &api), guest.send("disk".into()));
        detached.unwrap();
        told.unwrap();
        assert_eq!(attached.detach("disk", &api).await.unwrap_err().to_string(), GONE);
    }

    #[tokio::test]
    async fn a_guest_may_let_go_of_a_device_when_nobody_waits_for_that_any_more() {
        let (attached, api, guest) = with_disk().await;
        api.boot().await.unwrap();
        let given_up = timeout(Duration::from_millis(10), attached.detach("disk", &api)).await;
        assert!(given_up.is_err() && attached.known().contains_key("disk"));
        let mut changes = attached.host_sides.subscribe();
        guest.send("disk".into()).await.unwrap();
        changes.wait_for(HashMap::is_empty).await.unwrap();
        assert_eq!(attached.detach("disk", &api).await.unwrap_err().to_string(), GONE);
    }

    #[tokio::test]
    async fn before_the_boot_nobody_has_to_let_go_of_a_device() {
        let (attached, api, _guest) = with_disk().await;
        attached.detach("disk", &api).await.unwrap();
        assert!(attached.known().is_empty());
    }

    #[tokio::test]
    async fn a_device_is_attached_once() {
        let (attached, ..) = with_disk().await;
        assert_eq!(attached.begin("disk").unwrap_err().to_string(), "the VM has a device \"disk\" already");
    }

    #[tokio::test]
    async fn a_group_is_hidden_with_the_last_of_its_devices() {
        let (_guest, removed) = mpsc::channel(1);
        let function = |number| {
            let shown = vec![PathBuf::from(format!("/sys/bus/pci/devices/{number}")), "/dev/vfio/7".into()];
            (format!("gpu-{number}"), KnownHostSide { shown, file_server: None })
        };
        let attached = Attached::adopt(std::process::id(), HashMap::from([function(0), function(1)]), removed);
        assert_eq!(attached.take("gpu-0").shown, [Path::new("/sys/bus/pci/devices/0")]);
        assert_eq!(attached.take("gpu-1").shown, [Path::new("/sys/bus/pci/devices/1"), Path::new("/dev/vfio/7")]);
    }

    /// One that ends as `script` says.
    async fn with_file_server(script: &str) -> (Attached, tempfile::TempDir) {
        use caisson_protocol::vmm::Fs;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("virtiofsd");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let fs = Fs { tag: "data".into(), daemon_path: program.to_str().unwrap().into(), ..Default::default() };
        let file_server = Virtiofsd::listen(&fs, &dir.path().join("fs.sock"), &Lifetime::of_launcher()).unwrap();
        let (_, removed) = mpsc::channel(1);
        let attached = Attached::new(std::process::id(), removed);
        attached.begin("share").unwrap();
        attached.change("share", |host_side| host_side.file_server = Some(file_server));
        (attached, dir)
    }

    #[tokio::test]
    async fn a_file_server_that_fails_later_is_told() {
        let (attached, _dir) = with_file_server("echo no space left >&2; exit 1").await;
        let words = attached.failed().await;
        assert!(words.starts_with("the file server of share \"data\" ended: "), "{words}");
        assert!(words.ends_with("exited with status 1: no space left"), "{words}");
    }

    #[tokio::test]
    async fn a_file_server_that_is_ended_with_its_device_has_not_failed() {
        let (attached, _dir) = with_file_server("exec sleep 1000").await;
        tokio::select! {
            biased;
            words = attached.failed() => panic!("{words}"),
            ended = attached.end("share") => ended.unwrap(),
        }
    }

    #[tokio::test]
    async fn a_share_whose_file_server_ends_at_once_is_refused_in_its_words() {
        let (attached, dir) = with_file_server("echo no user namespaces here >&2; exit 4").await;
        attached.end("share").await.unwrap();
        let daemon_path = dir.path().join("virtiofsd").to_str().unwrap().to_owned();
        let fs = caisson_protocol::vmm::Fs { tag: "late".into(), daemon_path, ..Default::default() };
        let device = Device { id: "late".into(), kind: Some(Kind::Fs(fs)), ..Default::default() };
        let (near, _hangs) = tokio::net::UnixStream::pair().unwrap();
        let (run_dir, lifetime) = (RunDir::new(dir.path()), Lifetime::of_launcher());
        let host = Host { run_dir: &run_dir, lifetime: &lifetime };
        let refusal = attached.attach(&device, &host, &Api::over(near).await.unwrap()).await.unwrap_err().to_string();
        assert!(refusal.ends_with("exited with status 4: no user namespaces here"), "{refusal}");
        assert!(attached.known().is_empty());
    }
}
