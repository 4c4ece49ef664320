//! Guests that break rules.

use super::fake_guest::{FakeGuest, GUEST_CID, HOST_PORT, guest_ports, is_silent, read_some};
use crate::vsock::HOST_CID;
use crate::vsock::packet::Operation::{ReadWrite, Request, Reset, Response};
use crate::vsock::packet::{Header, Operation, TYPE_STREAM};

#[test]
fn packet_from_a_foreign_cid_is_dropped() {
    let mut guest = FakeGuest::new();
    let (mut program, ports) = guest.connected_from_guest();
    let reset = Header { operation: Reset as u16, ..guest.header(ports) };
    guest.send_packet(Header { src_cid: GUEST_CID + 1, ..reset }, &mut []);
    guest.expect_nothing();
    assert!(is_silent(&mut program));
}

#[test]
fn packet_to_another_cid_is_reset_from_there() {
    let mut guest = FakeGuest::new();
    let _listener = guest.listen(HOST_PORT);
    let request = Header { operation: Request as u16, ..guest.header(guest_ports()) };
    guest.send_packet(Header { dst_cid: 3, ..request }, &mut []);
    assert_eq!(guest.expect(Reset).header.src_cid, 3);
}

#[test]
fn unknown_socket_type_resets_the_connection() {
    let mut guest = FakeGuest::new();
    let (mut program, ports) = guest.connected_from_guest();
    let header = Header { operation: ReadWrite as u16, ..guest.header(ports) };
    guest.send_packet(Header { socket_type: 2, ..header }, &mut []);
    guest.expect(Reset);
    assert_eq!(read_some(&mut program), b"");
}

#[test]
fn unknown_operation_resets_the_connection() {
    let mut guest = FakeGuest::new();
    let (mut program, ports) = guest.connected_from_guest();
    guest.send_packet(Header { operation: 99, ..guest.header(ports) }, &mut []);
    guest.expect(Reset);
    assert_eq!(read_some(&mut program), b"");
}

#[test]
fn length_beyond_the_payload_resets_the_connection() {
    let mut guest = FakeGuest::new();
    let (mut program, ports) = guest.connected_from_guest();
    let header = Header { operation: ReadWrite as u16, len: 100, ..guest.header(ports) };
    guest.send_packet(header, &mut [1; 99]);
    guest.expect(Reset);
    assert_eq!(read_some(&mut program), b"");
}

#[test]
fn second_request_on_the_same_ports_resets_the_connection() {
    let mut guest = FakeGuest::new();
    let (mut program, ports) = guest.connected_from_guest();
    guest.send(ports, Request);
    guest.expect(Reset);
    assert_eq!(read_some(&mut program), b"");
}

#[test]
fn answer_to_no_question_is_reset() {
    let mut guest = FakeGuest::new();
    guest.send(guest_ports(), Response);
    guest.expect(Reset);
}

#[test]
fn reset_of_nothing_is_not_answered() {
    let mut guest = FakeGuest::new();
    guest.send(guest_ports(), Reset);
    guest.expect_nothing();
}

#[test]
fn guest_that_ignores_its_resets_is_made_to_wait() {
    let mut guest = FakeGuest::new();
    while !guest.muxer.is_congested() {
        guest.send_bytes(guest_ports(), b"nobody");
    }
    guest.expect(Reset);
    assert!(!guest.muxer.is_congested());
}

#[test]
fn no_sequence_of_packets_stops_the_device() {
    let mut guest = FakeGuest::new();
    let listener = guest.listen(HOST_PORT);
    listener.set_nonblocking(true).unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut programs = Vec::new();
    (0..200_000).for_each(|_| {
        match random.below(16) {
            0 => drop(guest.take()),
            1 => programs.extend(listener.accept().map(|(program, _)| program)),
            2 if !programs.is_empty() => {
                drop(programs.swap_remove(random.below(programs.len() as u64) as usize));
            }
            3 if programs.len() < 64 => programs.push(guest.ask(random.port())),
            4 => programs.iter_mut().take(4).for_each(|program| {
                program.set_nonblocking(true).unwrap();
                let _ = std::io::Write::write(program, b"some bytes");
                let _ = std::io::Read::read(program, &mut [0; 4096]);
            }),
            _ => {
                let (header, mut payload) = random.packet();
                guest.send_packet(header, &mut payload);
            }
        }
        while guest.muxer.is_congested() {
            guest.take();
        }
    });
    drop(programs);
    guest.muxer.abandon_connections();
    guest.connected_from_host();
}

/// xorshift64: the same packets in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// Few enough ports that packets meet connections.
    fn port(&mut self) -> u32 {
        50_000 + self.below(8) as u32
    }

    /// Mostly plausible packets; each field is wild now and then.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let payload = vec![1; self.below(300) as usize];
        let header = Header {
            src_cid: self.mostly(GUEST_CID),
            dst_cid: self.mostly(HOST_CID),
            src_port: self.port(),
            dst_port: match self.below(2) {
                0 => HOST_PORT,
                _ => (1 << 30) + self.below(64) as u32,
            },
            len: self.mostly(payload.len() as u64) as u32,
            socket_type: self.mostly(TYPE_STREAM.into()) as u16,
            operation: match self.below(3) {
                0 => Operation::ReadWrite as u16,
                _ => self.below(9) as u16,
            },
            flags: self.below(5) as u32,
            buf_alloc: self.mostly(4096) as u32,
            fwd_cnt: self.mostly(0) as u32,
        };
        (header, payload)
    }

    fn mostly(&mut self, value: u64) -> u64 {
        match self.below(16) {
            0 => self.below(u64::MAX),
            _ => value,
        }
    }
}
