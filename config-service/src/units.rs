//! systemd's units, for hosts that prefer its sockets to a service that the first shim starts.

use std::{os::unix::ffi::OsStrExt, path::Path};

/// `caisson-config-service.socket`
pub const SOCKET: &str = include_str!("../systemd/caisson-config-service.socket");

/// `caisson-config-service.service` for an installation below `prefix`.
pub fn service(prefix: &Path) -> String {
    let template = include_str!("../systemd/caisson-config-service.service");
    template.replace("@prefix@", &word(prefix))
}

/// `path` within one word of a command line, `systemd.service(5)`.
fn word(path: &Path) -> String {
    let escaped = |byte: &u8| match byte {
        b'%' => "%%".to_owned(),
        b'/' | b'.' | b'_' | b'-' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => char::from(*byte).to_string(),
        _ => format!("\\x{byte:02x}"),
    };
    path.as_os_str().as_bytes().iter().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_with_spaces_stays_one_word() {
        let unit = service(Path::new("/opt/my 100%"));
        assert!(unit.contains("ExecStart=/opt/my\\x20100%%/bin/caisson-config-service serve\n"), "{unit}");
    }
}
