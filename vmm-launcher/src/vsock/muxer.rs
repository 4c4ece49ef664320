//! All connections of one guest: the listening socket, the table, and who may speak next. It
//! takes and makes packets; virtqueues are device.rs' matter, and the rules of one connection
//! connection.rs'.
//!
//! Every host socket is in one edge-triggered epoll instance. An event only sets a flag in its
//! connection, so that a host program which writes while the guest has no room wakes us once, and
//! not over and over.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::debug;
use vm_memory::bitmap::BitmapSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Ports};
use super::handshake::{self, Handshake};
use super::listener::Listener;
use super::packet::{Buffer, Header, Operation, TYPE_STREAM};
use super::{Error, HOST_CID};

/// Host sockets of one guest, waiting clients included.
pub const MAX_CONNECTIONS: usize = 1024;
/// Resets for packets without a connection that may wait for the guest to take them.
const MAX_REFUSALS: usize = 256;
/// How long a guest may leave a finished connection unconfirmed; the same as Linux' own.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);
/// First port of CID 2 for host programs that connect; no service of the host is up there.
const FIRST_CLIENT_PORT: u32 = 1 << 30;

/// What an epoll event is about. Numbers are never used twice, so that a late event finds nothing.
type Token = u64;
const LISTENER: Token = 0;
const TIMER: Token = 1;
const FIRST_SOCKET: Token = 2;

/// The connections of one guest.
pub struct Muxer {
    guest_cid: u64,
    listener: Listener,
    epoll: Epoll,
    /// Sockets that have not said which port they want.
    clients: HashMap<Token, UnixStream>,
    entries: HashMap<Token, Entry>,
    /// Every connection that is not over for the guest.
    tokens: HashMap<Ports, Token>,
    /// Connections that want to send to the guest, in turn.
    ready: VecDeque<Token>,
    /// Answers to packets that belong to no connection.
    refusals: VecDeque<Header>,
    /// Connections that the guest must confirm the end of, by deadline; those that it did stay until their turn.
    closing: VecDeque<(Instant, Token)>,
    timer: TimerFd,
    next_token: Token,
    next_port: u32,
}

struct Entry {
    connection: Connection,
    /// In `ready`.
    queued: bool,
    /// In `closing`.
    timed: bool,
    /// What epoll was told to watch for.
    watched: EventSet,
}

impl Muxer {
    /// Listens on `uds` for host programs.
    ///
    /// # Errors
    /// When the path is too long, taken or not writable, or the kernel is out of descriptors.
    pub fn new(uds: &Path, guest_cid: u64) -> Result<Self, Error> {
        if !(HOST_CID + 1..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(Error::GuestCid(guest_cid));
        }
        let setup = |what| move |source| Error::Setup { what, source };
        let epoll = Epoll::new().map_err(setup("an epoll instance"))?;
        let timer = TimerFd::new().map_err(|e| Error::Setup { what: "a timer", source: e.into() })?;
        let listener = Listener::bind(uds)?;
        let muxer = Self {
            guest_cid,
            listener,
            epoll,
            clients: HashMap::new(),
            entries: HashMap::new(),
            tokens: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            closing: VecDeque::new(),
            timer,
            next_token: FIRST_SOCKET,
            next_port: FIRST_CLIENT_PORT,
        };
        muxer
            .watch(muxer.listener.as_raw_fd(), LISTENER)
            .and_then(|()| muxer.watch(muxer.timer.as_raw_fd(), TIMER))
            .map_err(setup("the listening socket's events"))?;
        Ok(muxer)
    }

    /// The context id that the guest was given.
    pub fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Whether there may be a packet for the guest.
    pub fn wants_guest(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// Whether no further packet should be taken from the guest until it has taken some itself.
    pub fn is_congested(&self) -> bool {
        self.refusals.len() >= MAX_REFUSALS
    }

    /// Handles everything that has happened on the host's sockets; never blocks.
    pub fn handle_host_events(&mut self) {
        let mut events = [EpollEvent::default(); 64];
        loop {
            let count = match self.epoll.wait(0, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.accept_clients(),
                    TIMER => self.reset_overdue(Instant::now()),
                    token => self.handle_socket(token, event.event_set()),
                }
            }
            if count < events.len() {
                return;
            }
        }
    }

    /// Takes a packet from the guest. The payload is as long as the header says, or shorter when
    /// the guest lied.
    pub fn receive<B: BitmapSlice>(&mut self, header: &Header, payload: &Buffer<'_, B>) {
        if header.src_cid != self.guest_cid {
            return debug!(cid = header.src_cid, "vsock packet from a foreign cid dropped");
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let token = match header.dst_cid {
            HOST_CID => self.tokens.get(&ports).copied(),
            _ => None,
        };
        let operation = Operation::from_number(header.operation).filter(|operation| {
            header.socket_type == TYPE_STREAM
                && header.dst_cid == HOST_CID
                && (*operation != Operation::ReadWrite || payload.len() == header.len as usize)
        });
        match (operation, token.and_then(|token| self.entries.get_mut(&token)), token) {
            (Some(operation), Some(entry), Some(token)) => {
                entry.connection.receive(operation, header, payload);
                self.settle(token);
            }
            (None, Some(entry), Some(token)) => {
                entry.connection.reset();
                self.settle(token);
            }
            (Some(Operation::Request), ..) => self.dial(header, ports),
            (Some(Operation::Reset), ..) => {}
            _ => self.refuse(header),
        }
    }

    /// Makes the next packet for the guest, its payload in `room`, which must not be empty.
    pub fn fill<B: BitmapSlice>(&mut self, room: &Buffer<'_, B>) -> Option<Header> {
        if let Some(header) = self.refusals.pop_front() {
            return Some(header);
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(entry) = self.entries.get_mut(&token) else { continue };
            entry.queued = false;
            let header = entry.connection.fill(room);
            self.settle(token);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// Forgets all connections, because the guest has; host programs still get what was sent.
    pub fn abandon_connections(&mut self) {
        self.refusals.clear();
        let tokens: Vec<Token> = self.entries.keys().copied().collect();
        for token in tokens {
            if let Some(entry) = self.entries.get_mut(&token) {
                entry.connection.abandon();
                self.settle(token);
            }
        }
    }

    /// Connects the guest's `request` to the program that listens for its port.
    fn dial(&mut self, request: &Header, ports: Ports) {
        if self.is_full() {
            debug!(port = ports.host, "vsock connection refused: too many");
            return self.refuse(request);
        }
        let token = self.new_token();
        let stream = self.listener.connect(ports.host).and_then(|stream| {
            self.watch(stream.as_raw_fd(), token)?;
            Ok(stream)
        });
        match stream {
            Ok(stream) => {
                debug!(?ports, "vsock connection from the guest");
                self.insert(token, Connection::accept(request, ports, stream));
            }
            Err(error) => {
                debug!(port = ports.host, %error, "vsock connection refused");
                self.refuse(request);
            }
        }
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, packet: &Header) {
        if packet.operation == Operation::Reset as u16 {
            return;
        }
        self.refusals.push_back(Header {
            src_cid: packet.dst_cid,
            dst_cid: packet.src_cid,
            src_port: packet.dst_port,
            dst_port: packet.src_port,
            socket_type: TYPE_STREAM,
            operation: Operation::Reset as u16,
            ..Header::default()
        });
    }

    fn accept_clients(&mut self) {
        // Until nobody is left; or no descriptor is, and the next client brings us back.
        while let Ok(client) = self.listener.accept() {
            let token = self.new_token();
            if !self.is_full() && self.watch(client.as_raw_fd(), token).is_ok() {
                self.clients.insert(token, client);
                // Most clients have spoken by now.
                self.handle_socket(token, EventSet::IN);
            }
        }
    }

    fn handle_socket(&mut self, token: Token, events: EventSet) {
        if let Some(entry) = self.entries.get_mut(&token) {
            entry.connection.host_event(events);
            return self.settle(token);
        }
        let Some(client) = self.clients.get(&token) else { return };
        match handshake::read(client) {
            Handshake::Waiting if !events.contains(EventSet::READ_HANG_UP) => {}
            Handshake::Waiting | Handshake::Invalid => drop(self.clients.remove(&token)),
            Handshake::Connect(guest) => {
                let host = self.new_client_port(guest);
                if let Some(stream) = self.clients.remove(&token) {
                    let ports = Ports { host, guest };
                    debug!(?ports, "vsock connection to the guest");
                    self.insert(token, Connection::request(self.guest_cid, ports, stream));
                }
            }
        }
    }

    /// Ends the connections whose end the guest has not confirmed in time.
    pub fn reset_overdue(&mut self, now: Instant) {
        while let Some((deadline, token)) = self.closing.front().copied() {
            let entry = self.entries.get_mut(&token).filter(|entry| entry.connection.is_closing());
            if entry.is_some() && deadline > now {
                return self.arm_timer(deadline - now);
            }
            self.closing.pop_front();
            if let Some(entry) = entry {
                debug!(ports = ?entry.connection.ports(), "vsock connection's end not confirmed");
                entry.connection.reset();
                self.settle(token);
            }
        }
    }

    fn insert(&mut self, token: Token, connection: Connection) {
        self.tokens.insert(connection.ports(), token);
        let entry = Entry { connection, queued: false, timed: false, watched: WATCHED };
        self.entries.insert(token, entry);
        self.settle(token);
    }

    /// Does what a connection wants after anything has happened to it.
    fn settle(&mut self, token: Token) {
        let Some(entry) = self.entries.get_mut(&token) else { return };
        let connection = &entry.connection;
        if connection.is_over_for_guest() && self.tokens.get(&connection.ports()) == Some(&token) {
            self.tokens.remove(&connection.ports());
        }
        if connection.is_gone() {
            debug!(ports = ?connection.ports(), "vsock connection closed");
            self.entries.remove(&token);
            return;
        }
        if connection.wants_guest() && !entry.queued {
            entry.queued = true;
            self.ready.push_back(token);
        }
        let watched = match connection.wants_writable() {
            true => WATCHED | EventSet::OUT,
            false => WATCHED,
        };
        if watched != entry.watched {
            entry.watched = watched;
            let event = EpollEvent::new(watched, token);
            let fd = connection.stream().as_raw_fd();
            // Fails only for a descriptor that was never added.
            let _ = self.epoll.ctl(ControlOperation::Modify, fd, event);
        }
        if connection.is_closing() && !entry.timed {
            entry.timed = true;
            self.closing.push_back((Instant::now() + CLOSE_TIMEOUT, token));
            if self.closing.len() == 1 {
                self.arm_timer(CLOSE_TIMEOUT);
            }
        }
    }

    fn arm_timer(&mut self, after: Duration) {
        // Fails only for durations that the kernel cannot express.
        let _ = self.timer.reset(after, None);
    }

    fn watch(&self, fd: RawFd, token: Token) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(WATCHED, token))
    }

    fn is_full(&self) -> bool {
        self.clients.len() + self.entries.len() >= MAX_CONNECTIONS
    }

    fn new_token(&mut self) -> Token {
        self.next_token += 1;
        self.next_token
    }

    /// A port of CID 2 that no connection to `guest` uses. There are more ports than connections.
    fn new_client_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_CLIENT_PORT);
            if !self.tokens.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }
}

impl AsRawFd for Muxer {
    /// Readable when [`handle_host_events`](Muxer::handle_host_events) has something to do.
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

const WATCHED: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP).union(EventSet::EDGE_TRIGGERED);
