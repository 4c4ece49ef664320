//! Bytes both ways, and the credit that bounds them.

use std::io::Write;

use super::fake_guest::{FakeGuest, GUEST_PORT, is_silent, read_some};
use crate::vsock::RECEIVE_WINDOW;
use crate::vsock::connection::Ports;
use crate::vsock::packet::Operation::{CreditRequest, CreditUpdate, ReadWrite, Request, Reset, Response};
use crate::vsock::packet::{Header, Operation};

#[test]
fn bytes_that_follow_the_connect_line_reach_the_guest_after_its_answer() {
    let mut guest = FakeGuest::new();
    let mut client = guest.ask(GUEST_PORT);
    client.write_all(b"early").unwrap();
    let request = guest.expect(Request).header;
    guest.expect_nothing();
    guest.send(Ports { host: request.src_port, guest: GUEST_PORT }, Response);
    assert_eq!(guest.expect(ReadWrite).payload, b"early");
}

#[test]
fn host_bytes_stop_at_the_guests_window_and_go_on_with_its_credit() {
    let mut guest = FakeGuest::new();
    guest.window = 10;
    let (mut client, ports) = guest.connected_from_host();
    client.write_all(b"0123456789abc").unwrap();
    assert_eq!(guest.expect(ReadWrite).payload, b"0123456789");
    guest.expect(CreditRequest);
    guest.expect_nothing();

    let update = Header { fwd_cnt: 2, ..guest.header(ports) };
    guest.send_packet(Header { operation: CreditUpdate as u16, ..update }, &mut []);
    assert_eq!(guest.expect(ReadWrite).payload, b"ab");
}

#[test]
fn guest_without_credit_leaves_the_device_idle() {
    let mut guest = FakeGuest::new();
    guest.window = 0;
    let (mut client, ports) = guest.connected_from_host();
    client.write_all(b"waiting").unwrap();
    guest.expect(CreditRequest);
    client.write_all(b" more").unwrap();
    guest.muxer.handle_host_events();
    assert!(!guest.muxer.wants_guest());

    // An answer that gives no credit must not start a conversation about it.
    guest.send(ports, CreditUpdate);
    assert!(!guest.muxer.wants_guest());
}

#[test]
fn guest_that_claims_to_have_read_the_future_gets_nothing() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    let lie = Header { fwd_cnt: 1000, operation: CreditUpdate as u16, ..guest.header(ports) };
    guest.send_packet(lie, &mut []);
    client.write_all(b"bytes").unwrap();
    guest.expect(CreditRequest);
    guest.expect_nothing();
}

#[test]
fn credit_request_is_answered_with_what_the_host_has_read() {
    let mut guest = FakeGuest::new();
    let (_client, ports) = guest.connected_from_host();
    guest.send_bytes(ports, b"12345");
    guest.send(ports, CreditRequest);
    let update = guest.expect(CreditUpdate).header;
    assert_eq!((update.fwd_cnt, update.buf_alloc), (5, RECEIVE_WINDOW));
}

#[test]
fn guest_is_told_about_freed_credit_once_half_the_window_is_read() {
    let mut guest = FakeGuest::new();
    let (_client, ports) = guest.connected_from_host();
    let half = RECEIVE_WINDOW as usize / 2;
    guest.send_bytes(ports, &vec![1; half - 1]);
    guest.expect_nothing();
    guest.send_bytes(ports, &[1]);
    assert_eq!(guest.expect(CreditUpdate).header.fwd_cnt, RECEIVE_WINDOW / 2);
}

#[test]
fn host_that_does_not_read_costs_one_window_and_loses_nothing() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    let (mut sent, mut told) = (Vec::new(), 0);
    // Fill socket and backlog: until no more credit comes back.
    loop {
        while sent.len() as u32 - told < RECEIVE_WINDOW {
            let packet: Vec<u8> = (0..4096).map(|i| (sent.len() / 4096 + i) as u8).collect();
            guest.send_bytes(ports, &packet);
            sent.extend(packet);
        }
        match guest.take() {
            Some(packet) => told = packet.header.fwd_cnt,
            None => break,
        }
    }
    let mut read = Vec::new();
    while read.len() < sent.len() {
        read.extend(read_some(&mut client));
        while let Some(packet) = guest.take() {
            assert_eq!(packet.operation(), CreditUpdate);
        }
    }
    assert!(is_silent(&mut client));
    assert!(read == sent, "{} bytes arrived of {}", read.len(), sent.len());
}

#[test]
fn guest_that_exceeds_its_credit_is_reset() {
    let mut guest = FakeGuest::new();
    let (mut client, ports) = guest.connected_from_host();
    guest.send_bytes(ports, &vec![1; RECEIVE_WINDOW as usize + 1]);
    guest.expect(Reset);
    assert_eq!(read_some(&mut client), b"");
}

#[test]
fn connections_take_turns() {
    let mut guest = FakeGuest::new();
    let (mut first, _) = guest.connected_from_host();
    let (mut second, _) = guest.connected_from_host();
    first.write_all(&[1; 3 * 4096]).unwrap();
    second.write_all(&[2; 3 * 4096]).unwrap();
    let turns: Vec<u32> = std::iter::from_fn(|| guest.take())
        .filter(|packet| packet.operation() == Operation::ReadWrite)
        .map(|packet| packet.header.src_port)
        .collect();
    assert_eq!(turns.len(), 6);
    assert!(turns.windows(2).all(|pair| pair[0] != pair[1]), "{turns:?}");
}
