//! Devices that come and go while the VM runs. It keeps no state of the VM; what it remembers is what each device has on
//! the host's side.

use std::{collections::HashMap, path::Path, sync::Mutex, time::Duration};

use caisson_protocol::vmm::{Device, GuestDevice, device::Kind};
use caisson_vmm_launcher::{
    Error, Result, jail,
    outlive::{Known, Lifetime},
    vfio::{self, HostDevice},
    virtiofsd::Virtiofsd,
};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::timeout,
};

use crate::{
    api::Api,
    configuration::{self, hotpluggable, taps},
    events,
    layout::{self, RunDir},
};

/// A guest without a working driver never lets go of a device.
const DETACH_DEADLINE: Duration = Duration::from_secs(20);

/// The attached devices of one VM.
#[derive(Debug, Default)]
pub struct Attached(Mutex<HashMap<String, HostSide>>);

/// Where a VM is on the host.
#[derive(Debug)]
pub struct Host<'a> {
    /// Its process.
    pub jailed: u32,
    pub run_dir: &'a RunDir,
    pub lifetime: &'a Lifetime,
}

/// What a device has on the host's side, from before it is attached until after it was detached.
#[derive(Debug, Default)]
struct HostSide {
    /// Where Cloud Hypervisor sees its files.
    shown: Vec<String>,
    file_server: Option<Virtiofsd>,
}

/// [`HostSide`] for another launcher.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct KnownHostSide {
    shown: Vec<String>,
    /// With the share's name.
    file_server: Option<(String, Known)>,
}

impl Attached {
    /// Those of an adopted VM.
    ///
    /// # Errors
    /// When a file server has ended.
    pub fn adopt(known: HashMap<String, KnownHostSide>) -> Result<Self> {
        let adopt = |(id, KnownHostSide { shown, file_server })| {
            let file_server = file_server.map(|(tag, known)| Virtiofsd::adopt(&tag, &known)).transpose()?;
            Ok((id, HostSide { shown, file_server }))
        };
        Ok(Self(Mutex::new(known.into_iter().map(adopt).collect::<Result<_>>()?)))
    }

    /// What another launcher needs to know of them.
    ///
    /// # Errors
    /// When a file server has ended.
    pub fn known(&self) -> Result<HashMap<String, KnownHostSide>> {
        let known = |(id, host_side): (&String, &HostSide)| {
            let file_server = host_side.file_server.as_ref().map(Virtiofsd::known).transpose()?;
            Ok((id.clone(), KnownHostSide { shown: host_side.shown.clone(), file_server }))
        };
        self.lock().iter().map(known).collect()
    }

    /// Adds `device` to the VM, and answers where the guest finds it.
    pub async fn attach(&self, device: &Device, host: &Host<'_>, api: &Api) -> Result<GuestDevice> {
        let (jailed, run_dir) = (host.jailed, host.run_dir);
        let (list, body) = hotpluggable(device)?;
        if self.lock().contains_key(&device.id) {
            return Err(Error::Invalid(format!("a device is attached as \"{}\" already", device.id)));
        }
        let taps = taps(device)?;
        let host_side = HostSide::make(device, host).await?;
        let place = match api.add(list, &body, taps).await {
            Ok(place) => place,
            Err(refusal) => {
                host_side.end(jailed).await?;
                return Err(refusal);
            }
        };
        self.lock().insert(device.id.clone(), host_side);
        let address = match (&device.kind, place) {
            (Some(Kind::Vfio(_)), Some(place)) => format!("pci:{place}"),
            _ => configuration::address(device, &run_dir.path(""))?,
        };
        Ok(GuestDevice { id: device.id.clone(), address, ..Default::default() })
    }

    /// Takes the device away that was attached as `id`, once the guest has let go of it.
    pub async fn detach(
        &self,
        id: &str,
        jailed: u32,
        api: &Api,
        mut events: Receiver<serde_json::Value>,
    ) -> Result<()> {
        if !self.lock().contains_key(id) {
            return Err(Error::Invalid(format!(
                "no device was attached as \"{}\" while the VM ran",
                id.escape_debug()
            )));
        }
        api.remove_device(id).await?;
        let gone = async {
            loop {
                match events.recv().await {
                    Ok(event) if events::is(&event, "vm", "device-removed") && event["properties"]["id"] == id => {
                        return true;
                    }
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return false,
                }
            }
        };
        match timeout(DETACH_DEADLINE, gone).await {
            Ok(true) => {}
            Ok(false) => return Err(Error::Hypervisor("Cloud Hypervisor has ended".into())),
            Err(_) => {
                let seconds = DETACH_DEADLINE.as_secs();
                return Err(Error::Hypervisor(format!(
                    "the guest did not let go of device \"{id}\" within {seconds} s"
                )));
            }
        }
        let host_side = self.lock().remove(id);
        host_side.unwrap_or_default().end(jailed).await
    }

    /// The VM has ended: nothing is left to take away from it.
    pub fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, HostSide>> {
        self.0.lock().expect("nobody panics with the devices")
    }
}

impl HostSide {
    async fn make(device: &Device, host: &Host<'_>) -> Result<Self> {
        let (path, writable) = match &device.kind {
            Some(Kind::Block(block)) => (&block.path, !block.read_only),
            Some(Kind::Pmem(pmem)) => (&pmem.path, !pmem.read_only),
            Some(Kind::Fs(fs)) => {
                let file_server = Virtiofsd::listen(fs, &host.run_dir.fs_socket(&device.id), host.lifetime)?;
                return Ok(Self { file_server: Some(file_server), ..Self::default() });
            }
            Some(Kind::Vfio(vfio)) => {
                return Self::of_host_device(&HostDevice::find(&vfio.address)?, host.jailed).await;
            }
            _ => return Ok(Self::default()),
        };
        let inside = layout::disk(&device.id);
        jail::show(host.jailed, Path::new(path), Path::new(&inside), writable).await?;
        Ok(Self { shown: vec![inside], ..Self::default() })
    }

    async fn of_host_device(device: &HostDevice, jailed: u32) -> Result<Self> {
        vfio::let_pin_memory(jailed)?;
        let mut host_side = Self::default();
        let sysfs = layout::host_device(&device.address);
        // The group is where it is on the host.
        let group = device.group.display().to_string();
        for (outside, inside, writable) in [(&device.sysfs, sysfs, false), (&device.group, group, true)] {
            if let Err(error) = jail::show(jailed, outside, Path::new(&inside), writable).await {
                host_side.end(jailed).await?;
                return Err(error);
            }
            host_side.shown.push(inside);
        }
        Ok(host_side)
    }

    async fn end(self, jailed: u32) -> Result<()> {
        if let Some(file_server) = self.file_server {
            file_server.end().await;
        }
        for inside in self.shown {
            jail::hide(jailed, Path::new(&inside)).await?;
        }
        Ok(())
    }
}
