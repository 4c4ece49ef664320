//! systemd's units, for hosts that prefer its sockets to a service that the first shim starts.

use std::path::Path;

/// `caisson-config-service.socket`
pub const SOCKET: &str = include_str!("../systemd/caisson-config-service.socket");

/// `caisson-config-service.service` for an installation below `prefix`.
pub fn service(prefix: &Path) -> String {
    let template = include_str!("../systemd/caisson-config-service.service");
    template.replace("@prefix@", &prefix.display().to_string())
}
