//! How guest code runs: by the processor (KVM), or by QEMU's own emulation (TCG).

use caisson_vmm_launcher::{Error, Result, kvm, qmp::Qmp};
use serde_json::json;

use crate::options::Accel;

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    /// As QEMU and the contract call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Chooses, and says why in one line.
///
/// # Errors
/// When KVM is demanded and does not run guests here.
pub async fn choose(wish: Accel) -> Result<(Accelerator, String)> {
    match wish {
        Accel::Tcg => Ok((Accelerator::Tcg, "accel = \"tcg\"".into())),
        Accel::Auto => match probe().await {
            Ok(()) => Ok((Accelerator::Kvm, "/dev/kvm runs guests".into())),
            Err(why) => Ok((Accelerator::Tcg, why)),
        },
        Accel::Kvm => match probe().await {
            Ok(()) => Ok((Accelerator::Kvm, "accel = \"kvm\"".into())),
            Err(why) => Err(Error::Invalid(format!(
                "accel = \"kvm\" cannot be used on this machine: {why}; \"tcg\" works without KVM and \"auto\" chooses"
            ))),
        },
    }
}

/// What a QEMU that runs already has.
pub async fn of(qmp: &Qmp) -> Result<Accelerator> {
    let kvm = qmp.execute("query-kvm", json!({})).await?;
    Ok(if kvm["enabled"] == true { Accelerator::Kvm } else { Accelerator::Tcg })
}

/// On a thread of its own: it takes some milliseconds, and longer where KVM is broken.
async fn probe() -> Result<(), String> {
    tokio::task::spawn_blocking(kvm::probe).await.unwrap_or_else(|_| Err("the probe of /dev/kvm failed".into()))
}
