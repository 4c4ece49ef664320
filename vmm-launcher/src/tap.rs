//! Tap interfaces, opened by the launcher: hypervisors get descriptors where they take any, and need then neither
//! `/dev/net/tun` nor a right to the network, nor to be where the interface is.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
};

use caisson_protocol::vmm::Net;
use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, c_int};
use nix::net::if_::if_nametoindex;

use crate::{Error, Result, sys};

const DEVICE: &str = "/dev/net/tun";

/// Opens the interface of `net`, a queue of it for each pair of the card's queues. Frames have a header of virtio-net in
/// front, and are read and written without waiting.
///
/// The interface must exist in this thread's network namespace; it is never made.
///
/// # Errors
/// With a sentence that says what to do.
pub fn open(net: &Net) -> Result<Vec<OwnedFd>> {
    // The kernel would make the interface.
    must_exist(&net.tap)?;
    let count = net.queue_pairs.max(1);
    (0..count).map(|_| open_queue(&net.tap, count > 1)).collect()
}

/// Refuses a name that no interface has in this thread's network namespace, which `/sys` may not show.
///
/// # Errors
/// [`Error::Invalid`].
pub fn must_exist(name: &str) -> Result<()> {
    if if_nametoindex(name).is_ok() {
        return Ok(());
    }
    Err(Error::Invalid(format!("there is no network interface {name}: make it with `ip tuntap add {name} mode tap`")))
}

fn open_queue(name: &str, many: bool) -> Result<OwnedFd> {
    let opened = match attach(name, if many { IFF_MULTI_QUEUE } else { 0 }) {
        // An interface with several queues says so of every one.
        Err(error) if !many && error.raw_os_error() == Some(libc::EINVAL) => attach(name, IFF_MULTI_QUEUE),
        opened => opened,
    };
    opened.map(OwnedFd::from).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => unusable(name, "another program uses it: end that, or use another interface"),
        Some(libc::EPERM) => {
            unusable(name, "it belongs to another user: run as its owner or with the capability CAP_NET_ADMIN")
        }
        Some(libc::E2BIG) => unusable(name, "it has no more queues: use fewer queue_pairs"),
        Some(libc::EINVAL) if many => unusable(
            name,
            "it is not a tap interface with several queues: make it with `ip tuntap add mode tap multi_queue`",
        ),
        Some(libc::EINVAL) => {
            unusable(name, "it is not a tap interface: make one with `ip tuntap add mode tap vnet_hdr`")
        }
        Some(libc::ENOENT) => unusable(name, "this machine has no /dev/net/tun: load the kernel module tun"),
        Some(libc::EACCES) => unusable(name, "/dev/net/tun may not be opened: let this user read and write it"),
        _ => Error::host(format!("open the tap interface {name} through {DEVICE}"))(error),
    })
}

fn attach(name: &str, flags: c_int) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
    sys::set_interface(&file, name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags)?;
    Ok(file)
}

fn unusable(name: &str, why: &str) -> Error {
    Error::Invalid(format!("the tap interface {name} cannot be used: {why}"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// A network namespace of this thread's own, with one tap interface, tap0.
    fn make_tap(options: &[&str]) {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let made = Command::new("ip").args(["tuntap", "add", "tap0", "mode", "tap"]).args(options).status();
        assert!(made.unwrap().success());
    }

    fn net(tap: &str, queue_pairs: u32) -> Net {
        Net { tap: tap.into(), queue_pairs, ..Default::default() }
    }

    fn refusal(net: &Net) -> String {
        open(net).expect_err("the tap must be refused").to_string()
    }

    #[test]
    fn a_tap_that_does_not_exist_is_named_and_not_made() {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let expected = "there is no network interface tap0: make it with `ip tuntap add tap0 mode tap`";
        assert_eq!(refusal(&net("tap0", 1)), expected);
        assert!(if_nametoindex("tap0").is_err());
    }

    #[test]
    fn an_interface_that_is_no_tap_is_refused() {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(refusal(&net("lo", 1)).starts_with("the tap interface lo cannot be used: it is not a tap interface"));
    }

    #[test]
    fn a_tap_in_use_is_refused_until_it_is_let_go() {
        make_tap(&[]);
        let used = open(&net("tap0", 1)).unwrap();
        let expected = "the tap interface tap0 cannot be used: another program uses it";
        assert!(refusal(&net("tap0", 1)).starts_with(expected));
        drop(used);
        open(&net("tap0", 1)).unwrap();
    }

    #[test]
    fn several_queues_on_a_tap_with_one_are_refused() {
        make_tap(&[]);
        assert!(refusal(&net("tap0", 2)).contains("multi_queue"));
    }

    #[test]
    fn one_queue_of_a_tap_with_several_is_used() {
        make_tap(&["multi_queue"]);
        // None is said as one.
        assert_eq!(open(&net("tap0", 0)).unwrap().len(), 1);
    }

    #[test]
    fn each_pair_has_a_queue() {
        make_tap(&["multi_queue"]);
        assert_eq!(open(&net("tap0", 3)).unwrap().len(), 3);
    }
}
