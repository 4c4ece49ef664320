//! A VM that was built, and what keeps it alive.

use std::sync::Arc;

use caisson_vmm_launcher::{Error, Result};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    event_loop::DeviceThread,
    memory::GuestMemory,
    serial::Serial,
    vcpu::Vcpus,
    virtio::{BalloonControl, Transport},
};

/// A VM. Dropping it ends its threads and waits for them: no more than a device's work in flight.
///
/// The fields are dropped in this order: the guest stops first, then its devices, and its memory last.
pub struct Machine {
    pub(crate) vcpus: Vcpus,
    #[expect(dead_code, reason = "ends when dropped")]
    pub(crate) device_thread: DeviceThread,
    pub(crate) attached: Vec<Attached>,
    pub(crate) balloon: Option<BalloonControl>,
    pub(crate) serial: Arc<Serial>,
    pub(crate) button: EventFd,
    #[expect(dead_code, reason = "the VM exists for as long as its descriptor")]
    pub(crate) vm: VmFd,
    #[expect(dead_code, reason = "the vCPUs use the mapping")]
    pub(crate) memory: GuestMemory,
}

/// A virtio device on its transport.
pub struct Attached {
    /// As in the request.
    pub id: String,
    /// By its name in the contract.
    pub kind: &'static str,
    pub(crate) transport: Arc<Transport>,
}

impl Machine {
    /// Lets the vCPUs run.
    pub fn run(&self) {
        self.vcpus.run();
    }

    /// Has the vCPUs stand; the answer is done when they do.
    pub fn stand(&self) -> impl Future<Output = Result<()>> + use<> {
        self.vcpus.stand()
    }

    /// What waits until all processes that serve devices have answered; it does not borrow the machine.
    pub fn backends(&self) -> impl FnOnce() -> Result<()> + Send + use<> {
        let transports: Vec<_> = self.attached.iter().map(|attached| attached.transport.clone()).collect();
        move || transports.iter().try_for_each(|transport| transport.meet_backend())
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// When the host fails.
    pub fn press_power_button(&self) -> Result<()> {
        self.button.write(1).map_err(Error::host("press the guest's power button"))
    }

    /// The hold of the VM's balloon, if it has one.
    pub fn balloon(&self) -> Option<BalloonControl> {
        self.balloon.clone()
    }

    /// Stops the vCPUs and waits for nobody; what the VM has goes with the process.
    pub fn abandon(self) {
        self.serial.send_rest();
        self.vcpus.abandon();
        std::mem::forget(self);
    }

    /// What the devices have counted, in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let mut families = std::collections::BTreeMap::<String, Vec<String>>::new();
        for Attached { id, kind, transport } in &self.attached {
            for (name, value) in transport.metrics() {
                let family = format!("caisson_vm_{kind}_{name}");
                let line = format!("{family}{{device=\"{id}\"}} {value}\n");
                families.entry(family).or_default().push(line);
            }
        }
        let text = |(family, lines): (String, Vec<String>)| {
            let kind = if family.ends_with("_total") { "counter" } else { "gauge" };
            format!("# TYPE {family} {kind}\n{}", lines.concat())
        };
        families.into_iter().map(text).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // A vCPU may be writing to a console that nobody reads.
        self.serial.hang_up();
    }
}
