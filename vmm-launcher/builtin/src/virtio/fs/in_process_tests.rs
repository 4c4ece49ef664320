use std::{fs, os::unix::fs::PermissionsExt};

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FsOptions, InHeader, InitIn, InitIn2, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION, Opcode, OpenIn,
    OpenOut, OutHeader, ROOT_ID, ReadIn, WriteIn,
};
use tempfile::TempDir;
use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;
use vm_memory_017::ByteValued;

use super::*;
use crate::virtio::fake_driver::{BUFFERS, FakeDriver, MEMORY_SIZE, Piece};

const REQUEST: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + (2 << 20);
const HEADER_SIZE: usize = size_of::<OutHeader>();
/// The queue of ordinary requests.
const QUEUE: usize = 1;

/// A share with its driver, in use.
struct Machine {
    device: InProcess,
    driver: FakeDriver,
    directory: TempDir,
}

fn share(directory: &TempDir) -> vmm::Fs {
    let shared_dir = directory.path().to_str().unwrap().into();
    vmm::Fs { tag: "share".into(), shared_dir, cache: "never".into(), ..Default::default() }
}

impl Machine {
    /// Mounted.
    fn start() -> Self {
        let mut machine = Self::new();
        machine.mount();
        machine
    }

    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut device = InProcess::new(&share(&directory)).unwrap();
        let driver = FakeDriver::new(&QUEUE_SIZES);
        device.activate(driver.driver(0)).unwrap();
        Self { device, driver, directory }
    }

    /// Mounts, and answers what was negotiated.
    fn mount(&mut self) -> Vec<u8> {
        let flags = FsOptions::all().bits() as u32;
        let init = InitIn { major: KERNEL_VERSION, minor: KERNEL_MINOR_VERSION, flags, ..Default::default() };
        let init = [init.as_slice(), InitIn2::default().as_slice()].concat();
        self.request(Opcode::Init, 0, &init, 256).unwrap()
    }

    /// Offers a request, with room for an answer.
    fn offer(&mut self, opcode: Opcode, node: u64, body: &[u8], room: u32) -> u16 {
        let len = (size_of::<InHeader>() + body.len()) as u32;
        let header = InHeader { len, opcode: opcode as u32, nodeid: node, unique: 1, ..Default::default() };
        self.driver.write(REQUEST, &[header.as_slice(), body].concat());
        let answer = Piece::Writable(ANSWER, HEADER_SIZE as u32 + room);
        self.driver.rings[QUEUE].offer_chain(&[Piece::Readable(REQUEST, len), answer])
    }

    /// Waits for the next used chain.
    fn used(&mut self) -> (u16, u32) {
        self.driver.kicks[QUEUE].write(1).unwrap();
        loop {
            match self.driver.rings[QUEUE].used() {
                Some(used) => return used,
                None => self.driver.wait_for_interrupt(),
            }
        }
    }

    /// Makes a request, and answers what comes after the answer's header, or the error's number.
    fn request(&mut self, opcode: Opcode, node: u64, body: &[u8], room: u32) -> Result<Vec<u8>, i32> {
        let head = self.offer(opcode, node, body, room);
        let (used, length) = self.used();
        assert_eq!(used, head);
        let bytes = self.driver.read(ANSWER, length as usize);
        let header = OutHeader::from_slice(&bytes[..HEADER_SIZE]).unwrap();
        match header.error {
            0 => Ok(bytes[HEADER_SIZE..].to_vec()),
            error => Err(-error),
        }
    }

    /// The number of a file in the shared directory.
    fn look_up(&mut self, name: &str) -> Result<u64, i32> {
        let entry = self.request(Opcode::Lookup, ROOT_ID, format!("{name}\0").as_bytes(), 256)?;
        Ok(u64::from_le_bytes(entry[..8].try_into().unwrap()))
    }

    fn open(&mut self, node: u64) -> u64 {
        let open = OpenIn { flags: libc::O_RDWR as u32, ..Default::default() };
        let opened = self.request(Opcode::Open, node, open.as_slice(), 256).unwrap();
        OpenOut::from_slice(&opened[..size_of::<OpenOut>()]).unwrap().fh
    }

    fn metric(&self, name: &str) -> u64 {
        self.device.metrics().into_iter().find(|(known, _)| *known == name).unwrap().1
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * n / 251 + n) as u8).collect()
}

#[test]
fn a_file_is_read() {
    let mut machine = Machine::start();
    let content = pattern(1 << 20);
    fs::write(machine.directory.path().join("file"), &content).unwrap();
    let node = machine.look_up("file").unwrap();
    let fh = machine.open(node);
    let read = ReadIn { fh, size: 1 << 20, ..Default::default() };
    assert!(machine.request(Opcode::Read, node, read.as_slice(), 1 << 20).unwrap() == content);
}

#[test]
fn a_file_is_written() {
    let mut machine = Machine::start();
    let path = machine.directory.path().join("file");
    fs::write(&path, "").unwrap();
    let node = machine.look_up("file").unwrap();
    let content = pattern(1 << 20);
    let write = WriteIn { fh: machine.open(node), size: content.len() as u32, ..Default::default() };
    machine.request(Opcode::Write, node, &[write.as_slice(), &content].concat(), 256).unwrap();
    assert!(fs::read(&path).unwrap() == content);
}

#[test]
fn what_is_not_in_the_directory_is_out_of_reach() {
    let mut machine = Machine::start();
    std::os::unix::fs::symlink("/etc/passwd", machine.directory.path().join("link")).unwrap();
    let link = machine.look_up("link").unwrap();
    let open = OpenIn::default();
    assert_eq!(machine.look_up("../x"), Err(libc::EINVAL));
    assert_eq!(machine.look_up("/etc/passwd"), Err(libc::EINVAL));
    assert_eq!(machine.look_up(".."), machine.look_up("."));
    assert!(machine.request(Opcode::Open, link, open.as_slice(), 256).is_err());
}

#[test]
fn a_file_gets_the_mode_that_the_guest_asks_for() {
    let mut machine = Machine::start();
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o100_666, ..Default::default() };
    machine.request(Opcode::Create, ROOT_ID, &[create.as_slice(), b"file\0"].concat(), 256).unwrap();
    let file = machine.directory.path().join("file");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o666);
}

#[test]
fn requests_may_be_long() {
    let mut machine = Machine::new();
    let answer = machine.mount();
    let max_write = InitOut::from_slice(&answer[..size_of::<InitOut>()]).unwrap().max_write;
    assert_eq!(max_write, 1 << 20);
}

#[test]
fn the_process_keeps_its_file_mode_creation_mask() {
    let machine = Machine::start();
    let file = machine.directory.path().join("file");
    fs::write(&file, "").unwrap();
    assert_ne!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o666);
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let mut machine = Machine::start();
    for _ in 0..200 {
        machine.offer(Opcode::Statfs, ROOT_ID, &[], 256);
    }
    let answered = (0..200).map(|_| machine.used()).filter(|(_, length)| *length > 0).count();
    assert_eq!(answered, 200);
    assert_eq!(machine.metric("requests_total"), 201);
}

/// Offers a chain that is no request, and then a good one, which must still be answered.
fn bad_chain_is_given_back(offer: impl FnOnce(&mut Machine) -> u16) {
    let mut machine = Machine::start();
    let head = offer(&mut machine);
    assert_eq!(machine.used(), (head, 0));
    assert_eq!(machine.metric("broken_requests_total"), 1);
    machine.request(Opcode::Statfs, ROOT_ID, &[], 256).unwrap();
}

#[test]
fn a_request_that_is_too_short_is_given_back() {
    bad_chain_is_given_back(|machine| {
        machine.driver.rings[QUEUE].offer_chain(&[Piece::Readable(REQUEST, 10), Piece::Writable(ANSWER, 100)])
    });
}

#[test]
fn a_request_without_a_request_is_given_back() {
    bad_chain_is_given_back(|machine| machine.driver.rings[QUEUE].offer_chain(&[Piece::Writable(ANSWER, 100)]));
}

#[test]
fn a_request_outside_guest_memory_is_given_back() {
    bad_chain_is_given_back(|machine| {
        machine.driver.rings[QUEUE].offer_chain(&[Piece::Readable(MEMORY_SIZE - 1, 100)])
    });
}

#[test]
fn a_chain_that_never_ends_is_given_back() {
    bad_chain_is_given_back(|machine| {
        machine.driver.rings[QUEUE].describe(100, REQUEST, 1, VRING_DESC_F_NEXT, 100);
        machine.driver.rings[QUEUE].offer(100);
        100
    });
}

#[test]
fn an_answer_without_room_is_given_back() {
    bad_chain_is_given_back(|machine| {
        let body = InHeader { len: 40, opcode: Opcode::Statfs as u32, nodeid: ROOT_ID, ..Default::default() };
        machine.driver.write(REQUEST, body.as_slice());
        machine.driver.rings[QUEUE].offer_chain(&[Piece::Readable(REQUEST, 40)])
    });
}

#[test]
fn a_length_that_is_a_lie_is_an_error() {
    let mut machine = Machine::start();
    let node = machine.look_up(".").unwrap();
    let write = WriteIn { fh: 1, size: u32::MAX, ..Default::default() };
    assert!(machine.request(Opcode::Write, node, write.as_slice(), 256).is_err());
    let read = ReadIn { fh: 1, size: u32::MAX, ..Default::default() };
    assert!(machine.request(Opcode::Read, node, read.as_slice(), 256).is_err());
}

#[test]
fn a_share_with_a_broken_queue_rests_until_it_is_reset() {
    let mut machine = Machine::start();
    machine.driver.rings[QUEUE].set_available(9999);
    machine.driver.kicks[QUEUE].write(1).unwrap();
    machine.device.reset();
    assert_eq!(machine.driver.rings[QUEUE].used(), None);

    machine.driver = FakeDriver::new(&QUEUE_SIZES);
    machine.device.activate(machine.driver.driver(0)).unwrap();
    machine.mount();
}

#[test]
fn a_share_without_a_driver_leaves_memory_alone() {
    let mut machine = Machine::start();
    machine.device.reset();
    machine.offer(Opcode::Statfs, ROOT_ID, &[], 256);
    machine.driver.kicks[QUEUE].write(1).unwrap();
    assert_eq!(machine.driver.rings[QUEUE].used(), None);
}

#[test]
fn a_directory_that_does_not_exist_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let fs = vmm::Fs { shared_dir: "/nonexistent/data".into(), ..share(&directory) };
    assert_eq!(InProcess::new(&fs).err().unwrap().to_string(), "shared_dir /nonexistent/data is not a directory");
}

#[test]
fn arguments_for_another_server_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let fs = vmm::Fs { extra_args: vec!["--xattr".into()], ..share(&directory) };
    assert!(InProcess::new(&fs).err().unwrap().to_string().contains("(--xattr)"));
}
