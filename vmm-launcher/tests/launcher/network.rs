//! A network of the test's own, with taps: the one of the test's thread, which launchers inherit.

use std::process::Command;

use caisson_protocol::vmm::{Device, Net, device::Kind};
use tokio::net::TcpListener;

use crate::fixture::device;

/// Where the host is reached through a tap, and what listens there.
pub const HOST: &str = "10.9.8.1:9";
/// Of [`card`].
pub const MAC: &str = "02:00:00:00:12:34";

/// Makes the network, with tap0 that is made with `options`.
pub fn make(options: &[&str]) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    make_tap("tap0", options);
}

/// Makes one tap more.
pub fn make_tap(name: &str, options: &[&str]) {
    ip(&[&["tuntap", "add", name, "mode", "tap"], options].concat());
}

/// Has the host behind `tap`, and something that listens.
pub async fn listen(tap: &str) -> TcpListener {
    reach_host_through(tap);
    TcpListener::bind(HOST).await.unwrap()
}

/// Has the host behind `tap`.
pub fn reach_host_through(tap: &str) {
    // A guest remembers it.
    ip(&["link", "set", tap, "address", "02:00:00:00:00:99"]);
    ip(&["address", "add", "10.9.8.1/24", "dev", tap]);
    ip(&["link", "set", tap, "up"]);
}

/// What a guest does first that uses its only card.
pub const GUEST_SETUP: &str = "ip address add 10.9.8.2/24 dev eth0\nip link set eth0 up";

/// A card on `tap`.
pub fn card(tap: &str, queue_pairs: u32) -> Kind {
    Kind::Net(Net { tap: tap.into(), mac: MAC.into(), queue_pairs, ..Default::default() })
}

/// A card on tap0, by the name "net".
pub fn card_device() -> Device {
    device("net", card("tap0", 1))
}

pub fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}
