//! `caisson config reference`.

use caisson_config_service::{installation::Installation, reference};
use serde_json::json;

use crate::output::Format;

pub(super) async fn run(installation: &Installation, format: Format) -> anyhow::Result<()> {
    let text = reference::generate(installation).await;
    format.print(&json!({ "markdown": text }), |_| text.clone())
}
