//! How connections come about, from both sides, and how they do not.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::fake_guest::{FakeGuest, GUEST_CID, GUEST_PORT, HOST_PORT, is_silent, read_some};
use crate::vsock::connection::Ports;
use crate::vsock::muxer::{MAX_CONNECTIONS, Muxer};
use crate::vsock::packet::Operation::{Request, Reset, Response};
use crate::vsock::{Error, HOST_CID, RECEIVE_WINDOW};

#[test]
fn host_request_reaches_the_guest_and_its_answer_the_client() {
    let mut guest = FakeGuest::new();
    let mut client = guest.ask(GUEST_PORT);
    let request = guest.expect(Request).header;
    assert_eq!((request.src_cid, request.dst_cid), (HOST_CID, GUEST_CID));
    assert_eq!((request.dst_port, request.buf_alloc), (GUEST_PORT, RECEIVE_WINDOW));
    assert!(is_silent(&mut client));

    guest.send(Ports { host: request.src_port, guest: GUEST_PORT }, Response);
    assert_eq!(read_some(&mut client), format!("OK {}\n", request.src_port).as_bytes());
}

#[test]
fn host_request_that_the_guest_refuses_ends_without_a_reply() {
    let mut guest = FakeGuest::new();
    let mut client = guest.ask(GUEST_PORT);
    let request = guest.expect(Request).header;
    guest.send(Ports { host: request.src_port, guest: GUEST_PORT }, Reset);
    assert_eq!(read_some(&mut client), b"");
    guest.expect_nothing();
}

#[test]
fn two_clients_of_one_guest_port_get_different_host_ports() {
    let mut guest = FakeGuest::new();
    let _clients = [guest.ask(GUEST_PORT), guest.ask(GUEST_PORT)];
    let first = guest.expect(Request).header.src_port;
    assert_ne!(guest.expect(Request).header.src_port, first);
}

#[test]
fn client_that_leaves_unheard_is_never_mentioned_to_the_guest() {
    let mut guest = FakeGuest::new();
    let client = guest.ask(GUEST_PORT);
    guest.muxer.handle_host_events();
    drop(client);
    guest.expect_nothing();
}

#[test]
fn client_that_leaves_before_the_answer_resets_its_request() {
    let mut guest = FakeGuest::new();
    let client = guest.ask(GUEST_PORT);
    guest.expect(Request);
    drop(client);
    guest.expect(Reset);
    guest.expect_nothing();
}

#[test]
fn client_that_half_closes_before_the_answer_is_still_connected() {
    let mut guest = FakeGuest::new();
    let mut client = guest.ask(GUEST_PORT);
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let request = guest.expect(Request).header;
    guest.send(Ports { host: request.src_port, guest: GUEST_PORT }, Response);
    assert!(read_some(&mut client).starts_with(b"OK "));
}

#[test]
fn client_that_speaks_something_else_is_disconnected() {
    let mut guest = FakeGuest::new();
    let mut client = UnixStream::connect(guest.uds()).unwrap();
    client.write_all(b"HELLO\n").unwrap();
    client.set_nonblocking(true).unwrap();
    guest.expect_nothing();
    assert_eq!(read_some(&mut client), b"");
}

#[test]
fn guest_request_reaches_the_socket_of_its_port() {
    let mut guest = FakeGuest::new();
    let (mut program, ports) = guest.connected_from_guest();
    guest.send_bytes(ports, b"hello");
    assert_eq!(read_some(&mut program), b"hello");
}

#[test]
fn guest_request_to_a_port_that_nobody_serves_is_reset() {
    let mut guest = FakeGuest::new();
    guest.send(Ports { host: HOST_PORT, guest: 50_000 }, Request);
    let reset = guest.expect(Reset).header;
    assert_eq!((reset.src_cid, reset.src_port), (HOST_CID, HOST_PORT));
    assert_eq!((reset.dst_cid, reset.dst_port), (GUEST_CID, 50_000));
}

#[test]
fn guest_request_beyond_the_limit_is_reset() {
    allow_many_descriptors();
    let mut guest = FakeGuest::new();
    let _listener = guest.listen(HOST_PORT);
    let limit = MAX_CONNECTIONS as u32;
    (0..limit).for_each(|port| guest.send(Ports { host: HOST_PORT, guest: port }, Request));
    (0..limit).for_each(|_| drop(guest.expect(Response)));
    guest.send(Ports { host: HOST_PORT, guest: limit }, Request);
    guest.expect(Reset);
}

#[test]
fn socket_disappears_with_the_device() {
    let guest = FakeGuest::new();
    let uds = guest.uds();
    assert!(uds.exists());
    drop(guest.muxer);
    assert!(!uds.exists());
}

#[test]
fn socket_that_is_taken_is_an_error_that_names_it() {
    let guest = FakeGuest::new();
    let error = Muxer::new(&guest.uds(), GUEST_CID).err().unwrap();
    assert!(error.to_string().contains(guest.uds().to_str().unwrap()));
    assert!(guest.uds().exists());
}

#[test]
fn socket_path_without_room_for_a_port_is_an_error() {
    let path = "/".repeat(97);
    let error = Muxer::new(Path::new(&path), GUEST_CID).err().unwrap();
    assert!(matches!(error, Error::PathTooLong { length: 97, limit: 96, .. }));
}

#[test]
fn longest_socket_path_leaves_room_for_the_longest_port() {
    let dir = tempfile::tempdir().unwrap();
    let path = format!("{}/{}", dir.path().display(), "v".repeat(95 - dir.path().as_os_str().len()));
    let _muxer = Muxer::new(Path::new(&path), GUEST_CID).unwrap();
    UnixListener::bind(format!("{path}_{}", u32::MAX)).unwrap();
}

#[test]
fn reserved_cid_is_an_error() {
    let error = Muxer::new(Path::new("/nonexistent/v"), HOST_CID).err().unwrap();
    assert!(matches!(error, Error::GuestCid(HOST_CID)));
}

fn allow_many_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}
