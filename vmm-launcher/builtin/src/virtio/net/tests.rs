//! Cards on taps of a network namespace of the test's own; the other end is the host's network stack.

use std::{fs, net::UdpSocket, process::Command};

use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::QueueT;

use super::*;
use crate::virtio::fake_driver::{BUFFERS, EventLoop, FakeDriver, MEMORY_SIZE, Piece};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HOST: &str = "10.9.8.1";
const GUEST: &str = "10.9.8.2";
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
/// Of Linux, where frames may fill several.
const BUFFER_SIZE: u32 = 1536;
/// Where frames to send are written.
const OUTGOING: u64 = BUFFERS + (4 << 20);

/// A network namespace with one tap interface, tap0.
fn make_tap(options: &[&str]) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    // The host has nothing to say of its own accord.
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    ip(&[&["tuntap", "add", "tap0", "mode", "tap"], options].concat());
    ip(&["address", "add", &format!("{HOST}/24"), "dev", "tap0"]);
}

/// A card on tap0, which is up afterwards: the host sends nothing to a tap that was up before somebody opened it, until the
/// kernel has noticed.
fn open_card(pairs: u32) -> Net {
    let card = Net::open(&request(pairs)).unwrap();
    ip(&["link", "set", "tap0", "up", "mtu", "9000"]);
    ip(&["neighbour", "add", GUEST, "lladdr", "02:00:00:00:00:01", "dev", "tap0"]);
    card
}

fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}

fn request(queue_pairs: u32) -> vmm::Net {
    vmm::Net { tap: "tap0".into(), mac: "02:00:00:00:00:01".into(), queue_pairs, ..Default::default() }
}

fn refusal(net: &vmm::Net) -> String {
    Net::open(net).err().expect("the tap must be refused").to_string()
}

/// A card with its driver, in use.
struct Machine {
    card: Net,
    driver: FakeDriver,
    events: EventLoop,
}

impl Machine {
    fn start(pairs: u32, features: u64) -> Self {
        let mut card = open_card(pairs);
        let driver = FakeDriver::new(card.queue_sizes());
        card.activate(driver.driver(features)).unwrap();
        let events = EventLoop::new(&card, &driver);
        Self { card, driver, events }
    }

    /// Gives the card room for frames.
    fn offer_room(&mut self, chains: u64) {
        for n in 0..chains {
            let piece = Piece::Writable(BUFFERS + n * u64::from(BUFFER_SIZE), BUFFER_SIZE);
            self.driver.rings[0].offer_chain(&[piece]);
        }
        self.card.queue_notified(0);
    }

    /// Waits for the next used chain of queue `index`.
    fn used(&mut self, index: usize) -> (u16, u32) {
        loop {
            match self.driver.rings[index].used() {
                Some(used) => return used,
                None => self.events.step(&mut self.card, &self.driver),
            }
        }
    }

    /// Waits for a frame, over however many buffers; the buffers are those of `offer_room`.
    fn received(&mut self) -> Vec<u8> {
        let (head, length) = self.used(0);
        let mut frame = self.buffer(head, length);
        let chains = u16::from_le_bytes([frame[10], frame[11]]);
        for _ in 1..chains {
            let (head, length) = self.driver.rings[0].used().expect("all parts of a frame come at once");
            frame.extend(self.buffer(head, length));
        }
        frame.split_off(HEADER_SIZE)
    }

    fn buffer(&self, head: u16, length: u32) -> Vec<u8> {
        self.driver.read(BUFFERS + u64::from(head) * u64::from(BUFFER_SIZE), length as usize)
    }

    /// Sends a frame on queue `index`, and answers its chain's head.
    fn send(&mut self, index: usize, frame: &[u8]) -> u16 {
        let bytes = [&[0; HEADER_SIZE], frame].concat();
        self.driver.write(OUTGOING, &bytes);
        let head = self.driver.rings[index].offer_chain(&[Piece::Readable(OUTGOING, bytes.len() as u32)]);
        self.card.queue_notified(index);
        head
    }

    fn metric(&self, name: &str) -> u64 {
        self.card.metrics().into_iter().find(|(known, _)| *known == name).unwrap().1
    }

    /// Sends a command on the control queue, and answers its status.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let control = self.card.queue_sizes().len() - 1;
        self.driver.write(OUTGOING, bytes);
        self.driver.write(OUTGOING + 0x1000, &[0xee]);
        let pieces = [Piece::Readable(OUTGOING, bytes.len() as u32), Piece::Writable(OUTGOING + 0x1000, 1)];
        let head = self.driver.rings[control].offer_chain(&pieces);
        self.card.queue_notified(control);
        assert_eq!(self.used(control), (head, 1));
        self.driver.read(OUTGOING + 0x1000, 1)[0]
    }
}

/// Asks who has the host's address; the host's network stack answers.
fn arp_request() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend([10, 9, 8, 2, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
    frame
}

fn is_arp_reply(frame: &[u8]) -> bool {
    frame[..6] == MAC && frame[12..14] == [8, 6] && frame[20..22] == [0, 2]
}

/// Sends a datagram to the guest.
fn send_datagram(payload: &[u8]) {
    UdpSocket::bind((HOST, 0)).unwrap().send_to(payload, (GUEST, 7)).unwrap();
}

/// Ethernet, IPv4 and UDP headers.
const BUFFERSGRAM_HEADERS: usize = 14 + 20 + 8;

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * n / 251 + n) as u8).collect()
}

#[test]
fn an_address_that_is_none_is_refused() {
    make_tap(&[]);
    let refuse = |mac: &str| refusal(&vmm::Net { mac: mac.into(), ..request(1) });
    assert!(refuse("02:00:00:00:00").contains("must be like"));
    assert!(refuse("02:00:00:00:00:01:02").contains("must be like"));
    assert!(refuse("02:00:00:00:00:zz").contains("must be like"));
}

#[test]
fn the_configuration_has_address_link_and_pairs() {
    make_tap(&["multi_queue"]);
    let card = Net::open(&request(2)).unwrap();
    let mut config = [0; 10];
    card.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 2, 0]);
    assert_eq!(card.queue_sizes(), [256, 256, 256, 256, 64]);
    assert_ne!(card.features() & 1 << VIRTIO_NET_F_MQ, 0);
}

#[test]
fn a_question_to_the_host_is_answered() {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE);
    machine.offer_room(200);
    let head = machine.send(1, &arp_request());
    assert_eq!(machine.used(1), (head, 0));
    assert!(is_arp_reply(&machine.received()));
    assert!(machine.driver.was_interrupted());
    assert_eq!(machine.metric("sent_frames_total"), 1);
    assert_eq!(machine.metric("sent_bytes_total"), 42);
    assert_eq!(machine.metric("received_frames_total"), 1);
}

#[test]
fn a_frame_may_be_cut_into_descriptors_anywhere() {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE);
    machine.offer_room(200);
    let bytes = [&[0; HEADER_SIZE][..], &arp_request()].concat();
    machine.driver.write(OUTGOING, &bytes);
    let at = |offset, length| Piece::Readable(OUTGOING + offset, length);
    machine.driver.rings[1].offer_chain(&[at(0, 7), at(7, 10), at(17, 0), at(17, 37)]);
    machine.card.queue_notified(1);
    assert!(is_arp_reply(&machine.received()));
}

#[test]
fn a_long_frame_fills_several_buffers() {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE);
    machine.offer_room(200);
    let payload = pattern(8000);
    send_datagram(&payload);
    assert!(machine.received()[BUFFERSGRAM_HEADERS..] == payload);
    // What was left of the room serves the next frames.
    send_datagram(&payload[..100]);
    send_datagram(&payload[..5000]);
    assert!(machine.received()[BUFFERSGRAM_HEADERS..] == payload[..100]);
    assert!(machine.received()[BUFFERSGRAM_HEADERS..] == payload[..5000]);
}

#[test]
fn the_header_may_be_cut_into_descriptors() {
    make_tap(&[]);
    let mut machine = Machine::start(1, 0);
    let at = |offset, length| Piece::Writable(BUFFERS + offset, length);
    machine.driver.rings[0].offer_chain(&[at(0, 11), at(11, 100), at(111, 1400)]);
    machine.card.queue_notified(0);
    send_datagram(&pattern(500));
    let (_, length) = machine.used(0);
    let frame = machine.driver.read(BUFFERS, length as usize);
    assert_eq!(frame[10..12], [1, 0]);
    assert!(frame[HEADER_SIZE + BUFFERSGRAM_HEADERS..] == pattern(500));
}

#[test]
fn a_frame_that_is_longer_than_its_buffer_is_dropped() {
    make_tap(&[]);
    let mut machine = Machine::start(1, 0);
    machine.offer_room(2);
    send_datagram(&pattern(8000));
    send_datagram(&pattern(10));
    assert!(machine.received()[BUFFERSGRAM_HEADERS..] == pattern(10));
    assert_eq!(machine.metric("receive_drops_total"), 1);
}

#[test]
fn frames_wait_until_the_driver_has_room() {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE);
    send_datagram(&pattern(10));
    machine.events.step(&mut machine.card, &machine.driver);
    assert!(!machine.driver.was_interrupted());
    machine.offer_room(200);
    assert!(machine.received()[BUFFERSGRAM_HEADERS..] == pattern(10));
}

#[test]
fn a_ring_too_small_for_the_longest_frame_receives_what_fits() {
    make_tap(&[]);
    let mut card = open_card(1);
    let driver = FakeDriver::new(&[4, 4, 4]);
    card.activate(driver.driver(MERGEABLE)).unwrap();
    let events = EventLoop::new(&card, &driver);
    let mut machine = Machine { card, driver, events };
    machine.offer_room(4);
    send_datagram(&pattern(8000));
    send_datagram(&pattern(3000));
    assert!(machine.received()[BUFFERSGRAM_HEADERS..] == pattern(3000));
    assert_eq!(machine.metric("receive_drops_total"), 1);
}

#[test]
fn a_driver_that_waits_for_more_is_not_interrupted() {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE | 1 << VIRTIO_RING_F_EVENT_IDX);
    // used_event: the second chain.
    machine.driver.rings[0].set_used_event(1);
    machine.offer_room(200);
    send_datagram(&pattern(10));
    machine.received();
    assert!(!machine.driver.was_interrupted());
    send_datagram(&pattern(10));
    machine.received();
    assert!(machine.driver.was_interrupted());
}

#[test]
fn other_devices_get_their_turn() {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE);
    let bytes = [&[0; HEADER_SIZE][..], &arp_request()].concat();
    machine.driver.write(OUTGOING, &bytes);
    for _ in 0..FRAMES_PER_PASS + 1 {
        machine.driver.rings[1].offer_chain(&[Piece::Readable(OUTGOING, bytes.len() as u32)]);
    }
    machine.card.queue_notified(1);
    assert_eq!(machine.metric("sent_frames_total"), FRAMES_PER_PASS as u64);
    assert!(machine.driver.was_kicked(1));
    machine.card.queue_notified(1);
    assert_eq!(machine.metric("sent_frames_total"), FRAMES_PER_PASS as u64 + 1);
    assert!(!machine.driver.was_kicked(1));
}

/// Offers a chain to send that is none, and then a good one, which must still arrive.
fn bad_chain_is_given_back(offer: impl FnOnce(&mut Machine) -> u16) {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE);
    machine.offer_room(200);
    let bad = offer(&mut machine);
    machine.card.queue_notified(1);
    assert_eq!(machine.used(1), (bad, 0));
    assert_eq!(machine.metric("send_drops_total"), 1);
    machine.send(1, &arp_request());
    assert!(is_arp_reply(&machine.received()));
}

#[test]
fn a_chain_that_never_ends_is_given_back() {
    bad_chain_is_given_back(|machine| {
        machine.driver.rings[1].describe(100, OUTGOING, 4096, VRING_DESC_F_NEXT, 100);
        machine.driver.rings[1].offer(100);
        100
    });
}

#[test]
fn a_chain_outside_guest_memory_is_given_back() {
    bad_chain_is_given_back(|machine| machine.driver.rings[1].offer_chain(&[Piece::Readable(MEMORY_SIZE - 10, 100)]));
}

#[test]
fn a_chain_beyond_all_addresses_is_given_back() {
    bad_chain_is_given_back(|machine| machine.driver.rings[1].offer_chain(&[Piece::Readable(u64::MAX - 10, 100)]));
}

#[test]
fn a_chain_of_the_wrong_direction_is_given_back() {
    bad_chain_is_given_back(|machine| machine.driver.rings[1].offer_chain(&[Piece::Writable(OUTGOING, 100)]));
}

#[test]
fn a_frame_without_a_header_is_given_back() {
    bad_chain_is_given_back(|machine| machine.driver.rings[1].offer_chain(&[Piece::Readable(OUTGOING, 11)]));
}

#[test]
fn a_frame_without_a_frame_is_given_back() {
    bad_chain_is_given_back(|machine| {
        machine.driver.write(OUTGOING, &[0; HEADER_SIZE]);
        machine.driver.rings[1].offer_chain(&[Piece::Readable(OUTGOING, HEADER_SIZE as u32)])
    });
}

#[test]
fn a_frame_that_is_too_long_is_given_back() {
    let length = MAX_FRAME as u32 + 1;
    bad_chain_is_given_back(|machine| machine.driver.rings[1].offer_chain(&[Piece::Readable(OUTGOING, length)]));
}

#[test]
fn room_of_the_wrong_direction_is_given_back() {
    make_tap(&[]);
    let mut machine = Machine::start(1, 0);
    let bad = machine.driver.rings[0].offer_chain(&[Piece::Readable(BUFFERS, BUFFER_SIZE)]);
    machine.offer_room(1);
    send_datagram(&pattern(10));
    assert_eq!(machine.used(0), (bad, 0));
    assert_eq!(machine.used(0).1 as usize, HEADER_SIZE + BUFFERSGRAM_HEADERS + 10);
}

#[test]
fn a_card_with_a_broken_queue_rests_until_it_is_reset() {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE);
    machine.driver.rings[1].set_available(257);
    machine.card.queue_notified(1);
    machine.send(1, &arp_request());
    machine.card.queue_notified(0);
    assert_eq!(machine.driver.rings[1].used(), None);

    machine.card.reset();
    machine.driver = FakeDriver::new(machine.card.queue_sizes());
    machine.card.activate(machine.driver.driver(MERGEABLE)).unwrap();
    machine.offer_room(200);
    machine.send(1, &arp_request());
    assert!(is_arp_reply(&machine.received()));
}

#[test]
fn a_card_without_a_driver_leaves_memory_alone() {
    make_tap(&[]);
    let mut machine = Machine::start(1, MERGEABLE);
    machine.offer_room(200);
    machine.card.reset();
    send_datagram(&pattern(10));
    machine.events.step(&mut machine.card, &machine.driver);
    machine.card.queue_notified(0);
    assert_eq!(machine.driver.rings[0].used(), None);
}

#[test]
fn a_queue_that_the_driver_did_not_set_up_is_left_alone() {
    make_tap(&[]);
    let mut card = open_card(1);
    let driver = FakeDriver::new(card.queue_sizes());
    let mut device_side = driver.driver(MERGEABLE);
    device_side.queues.iter_mut().for_each(|queue| queue.set_ready(false));
    card.activate(device_side).unwrap();
    (0..3).for_each(|queue| card.queue_notified(queue));
    assert_eq!(driver.read(0, BUFFERS as usize), vec![0; BUFFERS as usize]);
}

#[test]
fn commands_are_carried_out_or_refused() {
    const OK: u8 = 0;
    const ERR: u8 = 1;
    make_tap(&["multi_queue"]);
    let mut machine = Machine::start(2, MERGEABLE | 1 << VIRTIO_NET_F_MQ);
    let pairs = |count: u8| [4, 0, count, 0];
    assert_eq!(machine.command(&pairs(2)), OK);
    assert_eq!(machine.command(&pairs(1)), OK);
    assert_eq!(machine.command(&pairs(0)), ERR);
    assert_eq!(machine.command(&pairs(3)), ERR);
    assert_eq!(machine.command(&[4, 0, 2]), ERR);
    // Promiscuous mode, and one that was not offered.
    assert_eq!(machine.command(&[0, 0, 1]), OK);
    assert_eq!(machine.command(&[0, 2, 1]), ERR);
    assert_eq!(machine.command(&[77, 0, 0]), ERR);
    assert_eq!(machine.command(&[4]), ERR);
}

#[test]
fn a_command_that_leaves_no_room_for_its_status_is_given_back() {
    make_tap(&[]);
    let mut machine = Machine::start(1, 0);
    machine.driver.write(OUTGOING, &[0, 0, 1]);
    let head = machine.driver.rings[2].offer_chain(&[Piece::Readable(OUTGOING, 3)]);
    machine.card.queue_notified(2);
    assert_eq!(machine.used(2), (head, 0));
}

#[test]
fn every_pair_carries_frames_when_it_is_enabled() {
    make_tap(&["multi_queue"]);
    let mut machine = Machine::start(2, MERGEABLE | 1 << VIRTIO_NET_F_MQ);
    assert_eq!(machine.command(&[4, 0, 2, 0]), 0);
    machine.send(3, &arp_request());
    assert_eq!(machine.metric("sent_frames_total"), 1);
    assert_eq!(machine.metric("send_drops_total"), 0);
    assert_eq!(machine.command(&[4, 0, 1, 0]), 0);
    machine.offer_room(200);
    send_datagram(&pattern(10));
    loop {
        let frame = machine.received();
        if frame.ends_with(&pattern(10)) {
            break;
        }
        assert!(is_arp_reply(&frame));
    }
}
