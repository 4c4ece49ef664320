//! A guest made of packets: what a driver would put into its virtqueues goes straight to the
//! muxer. virtqueues.rs has the fake with real queues.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use tempfile::TempDir;
use vm_memory::VolatileSlice;

use crate::vsock::connection::Ports;
use crate::vsock::muxer::Muxer;
use crate::vsock::packet::{Buffer, Header, Operation, TYPE_STREAM};
use crate::vsock::{HOST_CID, RECEIVE_WINDOW};

pub const GUEST_CID: u64 = 42;
pub const HOST_PORT: u32 = 7000;
pub const GUEST_PORT: u32 = 1024;

/// A packet for the guest.
pub struct Packet {
    pub header: Header,
    pub payload: Vec<u8>,
}

impl Packet {
    pub fn operation(&self) -> Operation {
        Operation::from_number(self.header.operation).unwrap()
    }
}

pub struct FakeGuest {
    pub muxer: Muxer,
    /// Receive buffer that the guest claims to have on each connection.
    pub window: u32,
    dir: TempDir,
}

impl FakeGuest {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let muxer = Muxer::new(&dir.path().join("v"), GUEST_CID).unwrap();
        Self { muxer, window: RECEIVE_WINDOW, dir }
    }

    pub fn uds(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// A host program that listens for the guest on `port`.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    /// A host program that asks for `port` of the guest.
    pub fn ask(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.uds()).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// The header of a packet from the guest, without its operation.
    pub fn header(&self, ports: Ports) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            socket_type: TYPE_STREAM,
            buf_alloc: self.window,
            ..Header::default()
        }
    }

    pub fn send(&mut self, ports: Ports, operation: Operation) {
        let header = Header { operation: operation as u16, ..self.header(ports) };
        self.send_packet(header, &mut []);
    }

    pub fn send_shutdown(&mut self, ports: Ports, flags: u32) {
        let operation = Operation::Shutdown as u16;
        let header = Header { operation, flags, ..self.header(ports) };
        self.send_packet(header, &mut []);
    }

    pub fn send_bytes(&mut self, ports: Ports, bytes: &[u8]) {
        let operation = Operation::ReadWrite as u16;
        let header = Header { operation, len: bytes.len() as u32, ..self.header(ports) };
        self.send_packet(header, &mut bytes.to_vec());
    }

    pub fn send_packet(&mut self, header: Header, payload: &mut [u8]) {
        let payload = Buffer::new(vec![VolatileSlice::from(payload)]);
        self.muxer.receive(&header, &payload);
    }

    /// The next packet for the guest.
    pub fn take(&mut self) -> Option<Packet> {
        self.muxer.handle_host_events();
        let mut payload = vec![0; 4096];
        let room = Buffer::new(vec![VolatileSlice::from(&mut payload[..])]);
        let header = self.muxer.fill(&room)?;
        payload.truncate(header.len as usize);
        Some(Packet { header, payload })
    }

    /// The next packet for the guest, which must be an `operation`.
    pub fn expect(&mut self, operation: Operation) -> Packet {
        let packet = self.take().expect("a packet");
        assert_eq!(packet.operation(), operation);
        packet
    }

    pub fn expect_nothing(&mut self) {
        assert_eq!(self.take().map(|packet| packet.operation()), None);
    }

    /// An open connection that a host program asked for, with that program's end.
    pub fn connected_from_host(&mut self) -> (UnixStream, Ports) {
        let mut client = self.ask(GUEST_PORT);
        let request = self.expect(Operation::Request).header;
        let ports = Ports { host: request.src_port, guest: request.dst_port };
        self.send(ports, Operation::Response);
        assert_eq!(read_some(&mut client), format!("OK {}\n", ports.host).as_bytes());
        (client, ports)
    }

    /// An open connection that the guest asked for, with the host program's end.
    pub fn connected_from_guest(&mut self) -> (UnixStream, Ports) {
        let listener = self.listen(HOST_PORT);
        let ports = guest_ports();
        self.send(ports, Operation::Request);
        self.expect(Operation::Response);
        let program = listener.accept().unwrap().0;
        program.set_nonblocking(true).unwrap();
        (program, ports)
    }
}

/// The ports of a connection that the guest asks for.
pub fn guest_ports() -> Ports {
    Ports { host: HOST_PORT, guest: 50_000 }
}

/// What a non-blocking socket has.
pub fn read_some(socket: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let count = socket.read(&mut bytes).expect("bytes, or the end");
    bytes.truncate(count);
    bytes
}

/// Whether a non-blocking socket has nothing, and is not at its end either.
pub fn is_silent(socket: &mut UnixStream) -> bool {
    let result = socket.read(&mut [0]);
    result.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}
