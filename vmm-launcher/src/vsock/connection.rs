//! One stream between a host socket and a guest socket: its states, and credit both ways
//! (virtio 1.2 §5.10.6). It knows neither the table it lives in (muxer.rs) nor
//! virtqueues.
//!
//! ```text
//!   request()              accept()
//!       │                      │
//!       ▼       RESPONSE       ▼   host closed: SHUTDOWN both
//!   Requested ──────────────► Open ─────────────────────────► Closing
//!       │ RST, or the           │ RST, SHUTDOWN both,            │ RST, SHUTDOWN both,
//!       │ client left           │ a broken rule                  │ or too long
//!       └───────────────────────┴──────────► Ended ◄─────────────┘
//!                            gone when the guest has its RST (if it is owed one)
//!                            and the host has every byte that the guest sent
//! ```

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::bitmap::BitmapSlice;
use vmm_sys_util::epoll::EventSet;

use super::HOST_CID;
use super::credit::{ReceiveCredit, SendCredit};
use super::packet::{Buffer, Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};

/// Bytes that a guest may send on one connection before the host program has read them; the
/// default of Linux' own vsock sockets.
pub const RECEIVE_WINDOW: u32 = 256 * 1024;

/// The most bytes in one packet to the guest; Linux limits its own packets the same way.
const MAX_PAYLOAD: u32 = 64 * 1024;

/// What tells a guest's connections apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// Port on CID 2.
    pub host: u32,
    /// Port on the guest's CID.
    pub guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A host program asked; the guest has not answered.
    Requested,
    /// Bytes flow in the directions that nobody has shut down.
    Open,
    /// The host program is gone and the guest knows; it owes us a reset.
    Closing,
    /// Over for the guest. Bytes that it sent before are still on their way to the host program.
    Ended,
}

/// The directions that one side has given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Done {
    sending: bool,
    receiving: bool,
}

impl Done {
    const BOTH: Self = Self { sending: true, receiving: true };

    fn flags(self) -> u32 {
        u32::from(self.sending) * SHUTDOWN_SEND + u32::from(self.receiving) * SHUTDOWN_RECEIVE
    }
}

/// Packets without payload that the guest is owed.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
}

/// One connection. Whoever calls a method that changes it asks afterwards what it wants
/// ([`wants_guest`](Self::wants_guest), [`wants_writable`](Self::wants_writable)) and whether it
/// is over.
#[derive(Debug)]
pub struct Connection {
    guest_cid: u64,
    ports: Ports,
    stream: UnixStream,
    state: State,
    due: Due,
    guest_done: Done,
    host_done: Done,
    /// The part of `host_done` that the guest has been told.
    told: Done,

    /// Guest → host: what the socket would not take yet; never more than [`RECEIVE_WINDOW`].
    backlog: VecDeque<u8>,
    receive_credit: ReceiveCredit,

    /// Host → guest: whether a read may find something.
    readable: bool,
    send_credit: SendCredit,
}

impl Connection {
    /// A host program asked for a port of the guest.
    pub fn request(guest_cid: u64, ports: Ports, stream: UnixStream) -> Self {
        let due = Due { request: true, ..Due::default() };
        Self::new(guest_cid, ports, stream, State::Requested, due)
    }

    /// The guest's `request` was taken to `stream`.
    pub fn accept(request: &Header, ports: Ports, stream: UnixStream) -> Self {
        let due = Due { response: true, ..Due::default() };
        let mut connection = Self::new(request.src_cid, ports, stream, State::Open, due);
        connection.send_credit.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(guest_cid: u64, ports: Ports, stream: UnixStream, state: State, due: Due) -> Self {
        Self {
            guest_cid,
            ports,
            stream,
            state,
            due,
            guest_done: Done::default(),
            host_done: Done::default(),
            told: Done::default(),
            backlog: VecDeque::new(),
            receive_credit: ReceiveCredit::default(),
            readable: true,
            send_credit: SendCredit::default(),
        }
    }

    /// The ports, as they are in the table.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// The host socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether [`fill`](Self::fill) has a packet, or has to look for one.
    pub fn wants_guest(&self) -> bool {
        let due = self.due;
        due.request
            || due.response
            || due.reset
            || due.credit_update
            || (self.state == State::Open && (self.may_read() || self.host_done != self.told))
    }

    /// Whether the host socket's becoming writable is of interest.
    pub fn wants_writable(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether the guest may use the ports for a new connection.
    pub fn is_over_for_guest(&self) -> bool {
        self.state == State::Ended
    }

    /// Whether the guest has been told that it is over and has not confirmed it.
    pub fn is_closing(&self) -> bool {
        self.state == State::Closing
    }

    /// Whether nothing is left to do for either side.
    pub fn is_gone(&self) -> bool {
        self.state == State::Ended && !self.due.reset && self.backlog.is_empty()
    }

    /// Takes a packet from the guest.
    pub fn receive<B: BitmapSlice>(&mut self, operation: Operation, header: &Header, payload: &Buffer<'_, B>) {
        use Operation::*;
        self.send_credit.update(header.buf_alloc, header.fwd_cnt);
        match self.state {
            State::Requested => match operation {
                Response => self.confirm(),
                Reset => self.state = State::Ended,
                Request | Shutdown | ReadWrite | CreditUpdate | CreditRequest => self.reset(),
            },
            State::Open => match operation {
                ReadWrite => self.receive_bytes(payload),
                CreditUpdate => {}
                CreditRequest => self.due.credit_update = true,
                Shutdown => self.receive_shutdown(header.flags),
                Reset => self.abandon(),
                Request | Response => self.reset(),
            },
            State::Closing => match operation {
                // Under way while the host program left.
                ReadWrite | CreditUpdate | CreditRequest => {}
                Shutdown => self.receive_shutdown(header.flags),
                Reset => self.abandon(),
                Request | Response => self.reset(),
            },
            State::Ended => {}
        }
    }

    /// Makes the next packet for the guest, its payload in `room`, which must not be empty.
    pub fn fill<B: BitmapSlice>(&mut self, room: &Buffer<'_, B>) -> Option<Header> {
        if std::mem::take(&mut self.due.reset) {
            return Some(self.header(Operation::Reset));
        }
        if std::mem::take(&mut self.due.request) {
            return Some(self.header(Operation::Request));
        }
        if std::mem::take(&mut self.due.response) {
            return Some(self.header(Operation::Response));
        }
        if self.state == State::Open {
            let header = self.fill_bytes(room).or_else(|| self.fill_shutdown());
            if header.is_some() {
                return header;
            }
        }
        std::mem::take(&mut self.due.credit_update).then(|| self.header(Operation::CreditUpdate))
    }

    /// Takes note of what epoll says about the host socket.
    pub fn host_event(&mut self, events: EventSet) {
        self.readable = true;
        if events.contains(EventSet::OUT) {
            self.flush();
        }
        // Not raised by a half-close: neither side can send any more.
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            match self.state {
                State::Requested if self.due.request => self.abandon(),
                State::Requested => self.reset(),
                State::Open => self.host_stopped_receiving(),
                State::Closing | State::Ended => self.backlog.clear(),
            }
        }
    }

    /// Ends the connection and says so to the guest.
    pub fn reset(&mut self) {
        self.abandon();
        self.due.reset = true;
    }

    /// Ends the connection without a word to the guest, which knows it or has restarted.
    pub fn abandon(&mut self) {
        self.state = State::Ended;
        self.due = Due::default();
    }

    /// The guest answered the host program's request.
    fn confirm(&mut self) {
        let line = format!("OK {}\n", self.ports.host);
        match (&self.stream).write(line.as_bytes()) {
            Ok(count) if count == line.len() => self.state = State::Open,
            // The first bytes on a socket fit unless its other end is gone.
            _ => self.reset(),
        }
    }

    fn receive_bytes<B: BitmapSlice>(&mut self, payload: &Buffer<'_, B>) {
        if self.guest_done.sending || !self.receive_credit.receive(payload.len()) {
            return self.reset();
        }
        if self.host_done.receiving {
            return self.receive_credit.forward_all();
        }
        let written = match self.backlog.is_empty() {
            true => payload.write_to(&self.stream),
            false => Ok(0),
        };
        match written {
            Ok(count) => {
                self.note_forwarded(count);
                if count < payload.len() {
                    payload.append_to(&mut self.backlog, count);
                }
            }
            Err(_) => self.host_stopped_receiving(),
        }
    }

    fn receive_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.guest_done.receiving = true;
            // Fails only when the host program has closed its end, which an event will tell.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_done.sending = true;
            self.finish_sending();
        }
        if self.guest_done == Done::BOTH {
            self.reset();
        }
    }

    /// Writes the backlog, as far as the host socket takes it.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (front, back) = self.backlog.as_slices();
            let parts = [io::IoSlice::new(front), io::IoSlice::new(back)];
            match (&self.stream).write_vectored(&parts) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.note_forwarded(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.host_stopped_receiving(),
            }
        }
        self.backlog = VecDeque::new();
        self.finish_sending();
    }

    /// Passes the end of the guest's stream on, behind its last byte.
    fn finish_sending(&self) {
        if self.guest_done.sending && self.backlog.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn host_stopped_receiving(&mut self) {
        self.host_done.receiving = true;
        self.backlog = VecDeque::new();
        self.receive_credit.forward_all();
        // What the guest does not want any more need not be read to its end.
        self.host_done.sending |= self.guest_done.receiving;
    }

    fn may_read(&self) -> bool {
        self.readable && !self.host_done.sending && !self.guest_done.receiving && self.send_credit.is_usable()
    }

    fn fill_bytes<B: BitmapSlice>(&mut self, room: &Buffer<'_, B>) -> Option<Header> {
        if !self.may_read() {
            return None;
        }
        let credit = self.send_credit.available();
        if credit == 0 {
            self.send_credit.request();
            return Some(self.header(Operation::CreditRequest));
        }
        match room.read_from(&self.stream, credit.min(MAX_PAYLOAD) as usize) {
            Ok(0) => self.host_done.sending = true,
            Ok(count) => {
                self.send_credit.send(count as u32);
                return Some(Header { len: count as u32, ..self.header(Operation::ReadWrite) });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => self.host_done = Done::BOTH,
        }
        None
    }

    fn fill_shutdown(&mut self) -> Option<Header> {
        if self.host_done == self.told {
            return None;
        }
        self.told = self.host_done;
        if self.told == Done::BOTH {
            self.state = State::Closing;
        }
        Some(Header { flags: self.told.flags(), ..self.header(Operation::Shutdown) })
    }

    fn note_forwarded(&mut self, count: usize) {
        self.receive_credit.forward(count);
        self.due.credit_update |= self.state == State::Open && self.receive_credit.is_update_due();
    }

    /// A header that carries our credit, which every packet does.
    fn header(&mut self, operation: Operation) -> Header {
        self.due.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: 0,
            socket_type: TYPE_STREAM,
            operation: operation as u16,
            flags: 0,
            buf_alloc: RECEIVE_WINDOW,
            fwd_cnt: self.receive_credit.advertise(),
        }
    }
}
