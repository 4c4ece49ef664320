//! The size of a balloon, as QEMU's machine protocol and StratoVirt's dialect of it have it: both speak of the memory that
//! is left to the guest, of what it was made with.

use std::time::Duration;

use caisson_protocol::vmm::ResizeBalloonRequest;
use serde_json::json;
use tokio::time::timeout;

use crate::{Error, Result, qmp::Qmp, size::Sizes};

/// QEMU's, and StratoVirt's.
const CHANGED: [&str; 2] = ["BALLOON_CHANGE", "BALLOON_CHANGED"];

/// Has the guest of a VM with `sizes` give memory to its balloon, or take it back. Answers how much the balloon holds, in
/// MiB: how far the guest has come by the end of the request's time is an answer too.
///
/// # Errors
/// When the balloon cannot hold so much, or the hypervisor refuses.
pub async fn resize(request: &ResizeBalloonRequest, sizes: &Sizes, qmp: &Qmp) -> Result<u64> {
    sizes.can_give(request.memory_mib)?;
    let all = sizes.first.memory_mib << 20;
    let wanted = all - (request.memory_mib << 20);
    let mut events = qmp.events();
    qmp.execute("balloon", json!({ "value": wanted })).await?;
    let reached = async {
        while left(qmp).await? != wanted {
            qmp.next(&mut events, &CHANGED).await?;
        }
        Ok::<_, Error>(())
    };
    timeout(Duration::from_millis(request.timeout_ms.into()), reached).await.unwrap_or(Ok(()))?;
    Ok(all.saturating_sub(left(qmp).await?) >> 20)
}

/// In bytes: what the guest has.
async fn left(qmp: &Qmp) -> Result<u64> {
    let told = qmp.execute("query-balloon", json!({})).await?;
    let unknown = || Error::Hypervisor(format!("the hypervisor does not say what its balloon has left but {told}"));
    told["actual"].as_u64().ok_or_else(unknown)
}
