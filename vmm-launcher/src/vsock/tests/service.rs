//! The life of the vhost-user service: it must end whichever side goes first.

use std::io::{ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use super::fake_guest::GUEST_CID;
use crate::vsock::VsockBackend;

struct Host {
    backend: VsockBackend,
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let vhost_user = UnixListener::bind(dir.path().join("vhost-user")).unwrap();
        let backend = VsockBackend::start(vhost_user, &dir.path().join("v"), GUEST_CID).unwrap();
        Self { backend, dir }
    }

    fn uds(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    fn hypervisor(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("vhost-user")).unwrap()
    }
}

#[test]
fn backend_that_no_hypervisor_joined_ends_when_dropped() {
    let host = Host::new();
    let uds = host.uds();
    assert!(uds.exists());
    drop(host.backend);
    assert!(!uds.exists());
}

#[test]
fn backend_disconnects_its_hypervisor_when_dropped() {
    let host = Host::new();
    let hypervisor = host.hypervisor();
    drop(host.backend);
    assert_ends(hypervisor);
}

#[test]
fn backend_closes_its_clients_when_the_hypervisor_disconnects() {
    let host = Host::new();
    let client = UnixStream::connect(host.uds()).unwrap();
    drop(host.hypervisor());
    assert_ends(client);
}

/// Whether the other end is closed, before or after it was accepted.
fn assert_ends(mut socket: UnixStream) {
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    match socket.read(&mut [0]) {
        Ok(count) => assert_eq!(count, 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}
