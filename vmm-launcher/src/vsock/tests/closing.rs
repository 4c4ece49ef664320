//! How connections end: half by half, politely, abruptly, or not at all.

use std::io::Write;
use std::net::Shutdown as HostShutdown;
use std::time::Instant;

use super::fake_guest::{FakeGuest, HOST_PORT, is_silent, read_some};
use crate::vsock::RECEIVE_WINDOW;
use crate::vsock::muxer::CLOSE_TIMEOUT;
use crate::vsock::packet::Operation::{CreditUpdate, ReadWrite, Request, Reset, Response, Shutdown};
use crate::vsock::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

#[test]
fn host_that_stops_sending_can_still_receive() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    client.write_all(b"last").unwrap();
    client.shutdown(HostShutdown::Write).unwrap();
    assert_eq!(guest.expect(ReadWrite).payload, b"last");
    assert_eq!(guest.expect(Shutdown).header.flags, SHUTDOWN_SEND);
    guest.send_bytes(ports, b"reply");
    assert_eq!(read_some(&mut client), b"reply");
    guest.expect_nothing();
}

#[test]
fn guest_that_stops_sending_can_still_receive() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    guest.send_bytes(ports, b"last");
    guest.send_shutdown(ports, SHUTDOWN_SEND);
    assert_eq!(read_some(&mut client), b"last");
    assert_eq!(read_some(&mut client), b"");
    client.write_all(b"reply").unwrap();
    assert_eq!(guest.expect(ReadWrite).payload, b"reply");
}

#[test]
fn guest_that_stops_receiving_breaks_the_hosts_pipe_only() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    guest.send_shutdown(ports, SHUTDOWN_RECEIVE);
    assert!(client.write_all(b"unwanted").is_err());
    guest.send_bytes(ports, b"still");
    assert_eq!(read_some(&mut client), b"still");
    guest.expect_nothing();
}

#[test]
fn guest_that_sends_after_its_end_is_reset() {
    let mut guest = FakeGuest::new();
    let (_client, ports) = guest.connected_from_host();
    guest.send_shutdown(ports, SHUTDOWN_SEND);
    guest.send_bytes(ports, b"more");
    guest.expect(Reset);
}

#[test]
fn host_that_closes_is_confirmed_by_the_guest() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    client.write_all(b"last").unwrap();
    drop(client);
    let packets: Vec<_> = std::iter::from_fn(|| guest.take()).collect();
    let bytes: Vec<u8> = packets.iter().flat_map(|packet| packet.payload.clone()).collect();
    assert_eq!(bytes, b"last");
    let end = packets.last().unwrap();
    assert_eq!((end.operation(), end.header.flags), (Shutdown, SHUTDOWN_BOTH));

    guest.send_bytes(ports, b"under way");
    guest.send(ports, Reset);
    guest.expect_nothing();
    guest.send_bytes(ports, b"too late");
    guest.expect(Reset);
}

#[test]
fn guest_that_closes_gets_a_reset_and_the_host_the_end() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    guest.send_bytes(ports, b"last");
    guest.send_shutdown(ports, SHUTDOWN_BOTH);
    guest.expect(Reset);
    assert_eq!(read_some(&mut client), b"last");
    assert_eq!(read_some(&mut client), b"");
}

#[test]
fn bytes_outlive_the_guests_connection_and_its_ports_are_free_again() {
    let mut guest = FakeGuest::new();
    let listener = guest.listen(HOST_PORT);
    let ports = super::fake_guest::guest_ports();
    guest.send(ports, Request);
    let mut told = guest.expect(Response).header.fwd_cnt;
    let mut program = listener.accept().unwrap().0;
    program.set_nonblocking(true).unwrap();
    let mut sent = 0;
    // More than the socket takes, so that a part waits in the device.
    while sent - told < RECEIVE_WINDOW {
        guest.send_bytes(ports, &[7; 32 * 1024]);
        sent += 32 * 1024;
        if let Some(packet) = guest.take() {
            assert_eq!(packet.operation(), CreditUpdate);
            told = packet.header.fwd_cnt;
        }
    }
    guest.send_shutdown(ports, SHUTDOWN_BOTH);
    guest.expect(Reset);
    guest.send(ports, Request);
    guest.expect(Response);

    let mut read = 0;
    loop {
        let count = read_some(&mut program).len();
        if count == 0 {
            break;
        }
        read += count;
        guest.expect_nothing();
    }
    assert_eq!(read, sent as usize);
}

#[test]
fn host_that_closes_with_unread_bytes_ends_the_guests_connection() {
    let mut guest = FakeGuest::new();
    let (client, ports) = guest.connected_from_host();
    guest.send_bytes(ports, b"unread");
    drop(client);
    assert_eq!(guest.expect(Shutdown).header.flags, SHUTDOWN_BOTH);
}

#[test]
fn guest_that_does_not_confirm_the_end_is_reset_after_a_while() {
    let mut guest = FakeGuest::new();
    let (client, _) = guest.connected_from_host();
    drop(client);
    guest.expect(Shutdown);
    guest.muxer.reset_overdue(Instant::now());
    guest.expect_nothing();
    guest.muxer.reset_overdue(Instant::now() + CLOSE_TIMEOUT);
    guest.expect(Reset);
    guest.expect_nothing();
}

#[test]
fn guest_reset_closes_the_hosts_socket() {
    let mut guest = FakeGuest::new();
    let (mut program, ports) = guest.connected_from_guest();
    assert!(is_silent(&mut program));
    guest.send(ports, Reset);
    assert_eq!(read_some(&mut program), b"");
    guest.expect_nothing();
}

#[test]
fn restarted_guest_loses_its_connections_without_a_packet() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    client.write_all(b"for the old one").unwrap();
    guest.muxer.abandon_connections();
    guest.expect_nothing();
    assert!(read_some_or_error(&mut client).is_empty());
    guest.send_bytes(ports, b"who are you?");
    guest.expect(Reset);
}

/// Like `read_some`; a connection that ends with our bytes unread is an error to us.
fn read_some_or_error(socket: &mut std::os::unix::net::UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    let count = std::io::Read::read(socket, &mut bytes).unwrap_or(0);
    bytes.truncate(count);
    bytes
}
