//! Makes the devices that a request names, and tells where the guest finds them.

use std::path::Path;

use caisson_protocol::vmm::{Block, Device, VmConfig, device::Kind};
use caisson_vmm_launcher::{
    Error, Result,
    outlive::Lifetime,
    request,
    virtiofsd::{FileServers, Virtiofsd},
};
use vm_memory::GuestAddress;

use crate::{
    memory::{self, GuestMemory},
    options::{BlockIo, FileServer, Options},
    virtio::{self, BalloonControl, IoEngine, Pmem, PmemImage, VirtioDevice, fs},
};

/// The kinds of device that a guest can have, by their names in the contract.
pub const KINDS: [&str; 8] = ["block", "net", "vsock", "fs", "pmem", "balloon", "rng", "console"];
/// Persistent memory begins at a multiple of this: what Linux wants of a memory section, and more.
const PMEM_ALIGNMENT: u64 = 1 << 30;
/// The image is the first disk.
const IMAGE_ID: &str = "image";

/// A device that is not on a transport yet.
pub struct NamedDevice {
    /// As in the request.
    pub id: String,
    /// By its name in the contract.
    pub kind: &'static str,
    /// The device itself.
    pub device: Box<dyn VirtioDevice>,
}

/// What a VM's devices are made with.
pub struct Devices<'a> {
    options: &'a Options,
    run_dir: &'a Path,
    file_servers: &'a mut FileServers,
    made: Made,
}

/// The devices of a VM.
#[derive(Default)]
pub struct Made {
    /// The image first.
    pub devices: Vec<NamedDevice>,
    /// Where the guest finds those of the request, in its order.
    pub addresses: Vec<String>,
    /// The host's hold of the balloon, if there is one.
    pub balloon: Option<BalloonControl>,
}

impl<'a> Devices<'a> {
    /// No devices yet. `file_servers` gets the processes that they need.
    pub fn new(options: &'a Options, run_dir: &'a Path, file_servers: &'a mut FileServers) -> Self {
        Self { options, run_dir, file_servers, made: Made::default() }
    }

    /// Makes all that `vm` names. `memory` grows by persistent memory.
    ///
    /// # Errors
    /// When a device cannot be had.
    pub fn make(mut self, vm: &VmConfig, memory: &mut GuestMemory) -> Result<Made> {
        if !vm.image.is_empty() {
            let image = Block { path: vm.image.clone(), read_only: true, ..Default::default() };
            self.block(IMAGE_ID, &image)?;
        }
        self.made.addresses = vm.devices.iter().map(|device| self.add(device, memory)).collect::<Result<_>>()?;
        Ok(self.made)
    }

    fn add(&mut self, device: &Device, memory: &mut GuestMemory) -> Result<String> {
        let id = device.id.as_str();
        let kind = request::kind(device)?;
        match kind {
            Kind::Block(block) => self.block(id, block),
            Kind::Net(net) => self.push(id, "net", virtio::Net::open(net)?, String::new()),
            Kind::Vsock(vsock) => {
                self.push(id, "vsock", virtio::Vsock::open(vsock)?, format!("hvsock:{}", vsock.socket))
            }
            Kind::Fs(share) => {
                let address = format!("tag:{}", share.tag);
                match self.options.file_server {
                    FileServer::Builtin => self.push(id, "fs", fs::InProcess::new(share)?, address),
                    FileServer::Virtiofsd => {
                        let (daemon, connection) = Virtiofsd::start(share, self.run_dir, &Lifetime::of_launcher())?;
                        self.file_servers.add(daemon);
                        self.push(id, "fs", fs::over_vhost_user(share, connection)?, address)
                    }
                }
            }
            Kind::Pmem(pmem) => {
                let image = PmemImage::open(pmem)?;
                let start = GuestAddress(memory::end(memory).next_multiple_of(PMEM_ALIGNMENT));
                let region = std::sync::Arc::new(image.region(start)?);
                *memory = memory
                    .insert_region(region)
                    .map_err(|error| Error::host(format!("map {}", pmem.path))(std::io::Error::other(error)))?;
                self.push(id, "pmem", Pmem::new(image, start), String::new())
            }
            Kind::Balloon(balloon) => {
                let (balloon, control) = virtio::Balloon::new(balloon);
                self.made.balloon = Some(control);
                self.push(id, "balloon", balloon, String::new())
            }
            Kind::Rng(rng) => self.push(id, "rng", virtio::Rng::open(rng)?, String::new()),
            // The serial port, which every guest has.
            Kind::Console(_) => Ok(String::new()),
            other => {
                let kind = request::kind_name(other);
                Err(Error::Unsupported(format!("a {kind} device is not supported with the built-in VMM")))
            }
        }
    }

    fn block(&mut self, id: &str, block: &Block) -> Result<String> {
        let engine = match self.options.block_io {
            BlockIo::Auto => IoEngine::Auto,
            BlockIo::Thread => IoEngine::Thread,
        };
        self.push(id, "block", virtio::Block::open(id, block, engine)?, format!("serial:{id}"))
    }

    fn push(
        &mut self,
        id: &str,
        kind: &'static str,
        device: impl VirtioDevice + 'static,
        address: String,
    ) -> Result<String> {
        self.made.devices.push(NamedDevice { id: id.to_owned(), kind, device: Box::new(device) });
        Ok(address)
    }
}
