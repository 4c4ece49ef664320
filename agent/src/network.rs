//! The guest's interfaces and routes.

use std::{fs, net::IpAddr, time::Duration};

use caisson_protocol::guest::{Interface, Route};
use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::link::{LinkAttribute, LinkMessage},
};

use crate::{
    error::{Error, Result},
    uevents,
};

/// How long a network device that was plugged in may take to be seen.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);

/// The kernel's network tables.
pub struct Network(Handle);

impl Network {
    /// Opens a connection to the kernel.
    ///
    /// # Errors
    /// When there is no netlink.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| Error::System { what: "open the kernel's network tables".into(), source })?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Brings the loopback device up.
    ///
    /// # Errors
    /// When the kernel has none.
    pub async fn loopback_up(&self) -> Result<()> {
        let up = LinkUnspec::new_with_name("lo").up().build();
        self.0.link().set(up).execute().await.map_err(|error| refused("bring up lo", &error))
    }

    /// Makes `interface` what it says: name, addresses, size, up.
    ///
    /// # Errors
    /// When no device has its MAC address, or the kernel refuses.
    pub async fn configure(&self, interface: &Interface) -> Result<()> {
        let mac = parse_mac(&interface.mac)?;
        let addresses = interface.addresses.iter().map(|text| parse_cidr(text)).collect::<Result<Vec<_>>>()?;
        let what = format!("network device {}", interface.mac);
        uevents::until(&what, DEVICE_LIMIT, || device_exists(&interface.mac).then_some(())).await?;
        let link = self.find(&mac).await?.ok_or_else(|| Error::NotFound(format!("no {what}")))?;
        let index = link.header.index;

        let mut change = LinkUnspec::new_with_index(index);
        if !interface.name.is_empty() && name_of(&link) != Some(interface.name.as_str()) {
            // The kernel renames only what is down.
            let renamed = LinkUnspec::new_with_index(index).down().name(interface.name.clone()).build();
            let named = self.0.link().set(renamed).execute().await;
            named.map_err(|error| refused(&format!("name {what} {}", interface.name), &error))?;
        }
        if interface.mtu != 0 {
            change = change.mtu(interface.mtu);
        }
        let set = self.0.link().set(change.up().build()).execute().await;
        set.map_err(|error| refused(&format!("bring up {what}"), &error))?;
        for (address, prefix) in addresses {
            let added = self.0.address().add(index, address, prefix).replace().execute().await;
            added.map_err(|error| refused(&format!("give {what} the address {address}/{prefix}"), &error))?;
        }
        Ok(())
    }

    /// Adds a route, or replaces the one to the same destination.
    ///
    /// # Errors
    /// When its interface does not exist, or the kernel refuses.
    pub async fn route(&self, route: &Route) -> Result<()> {
        let what = format!("route to {} through {}", named(&route.destination), route.interface);
        let gateway = (!route.gateway.is_empty()).then(|| parse_address(&route.gateway)).transpose()?;
        let (destination, prefix) = match (route.destination.as_str(), gateway) {
            ("", Some(IpAddr::V6(_))) => (IpAddr::from([0u16; 8]), 0),
            ("", _) => (IpAddr::from([0u8; 4]), 0),
            (text, _) => parse_cidr(text)?,
        };
        let wrong = |error| Error::Invalid(format!("{what}: {error}"));
        let mut message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination, prefix)
            .map_err(|error| wrong(error.to_string()))?;
        if let Some(gateway) = gateway {
            message = message.gateway(gateway).map_err(|error| wrong(error.to_string()))?;
        }
        if !route.interface.is_empty() {
            message = message.output_interface(self.index(&route.interface).await?);
            if gateway.is_some() {
                // The gateway of a pod is often outside of the pod's own network.
                message = message.onlink();
            }
        }
        let added = self.0.route().add(message.build()).replace().execute().await;
        added.map_err(|error| refused(&format!("add {what}"), &error))
    }

    async fn find(&self, mac: &[u8]) -> Result<Option<LinkMessage>> {
        let mut links = self.0.link().get().execute();
        while let Some(link) = links.try_next().await.map_err(|error| refused("list network devices", &error))? {
            if link.attributes.iter().any(|one| matches!(one, LinkAttribute::Address(address) if address == mac)) {
                return Ok(Some(link));
            }
        }
        Ok(None)
    }

    async fn index(&self, name: &str) -> Result<u32> {
        let mut links = self.0.link().get().match_name(name.to_owned()).execute();
        match links.try_next().await {
            Ok(Some(link)) => Ok(link.header.index),
            _ => Err(Error::NotFound(format!("no network device {name}"))),
        }
    }
}

fn device_exists(mac: &str) -> bool {
    let devices = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    devices
        .map(|device| fs::read_to_string(device.path().join("address")).unwrap_or_default())
        .any(|address| address.trim().eq_ignore_ascii_case(mac))
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|one| match one {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn named(destination: &str) -> &str {
    if destination.is_empty() { "anywhere" } else { destination }
}

fn parse_mac(text: &str) -> Result<Vec<u8>> {
    let octets: Option<Vec<u8>> = text.split(':').map(|octet| u8::from_str_radix(octet, 16).ok()).collect();
    octets
        .filter(|octets| octets.len() == 6)
        .ok_or_else(|| Error::Invalid(format!("\"{}\" is not a MAC address", text.escape_debug())))
}

fn parse_address(text: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| Error::Invalid(format!("\"{}\" is not an IP address", text.escape_debug())))
}

fn parse_cidr(text: &str) -> Result<(IpAddr, u8)> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        let (address, prefix) = (address.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok()?);
        (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
    };
    parse().ok_or_else(|| {
        Error::Invalid(format!("\"{}\" is not an address with a prefix, as 10.0.0.2/24", text.escape_debug()))
    })
}

fn refused(what: &str, error: &rtnetlink::Error) -> Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => Error::System { what: what.to_owned(), source: message.to_io() },
        other => Error::Invalid(format!("{what}: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_needs_a_prefix_that_fits() {
        assert_eq!(parse_cidr("10.0.0.2/24").unwrap(), (IpAddr::from([10, 0, 0, 2]), 24));
        assert!(parse_cidr("10.0.0.2").is_err());
        assert!(parse_cidr("10.0.0.2/33").is_err());
        assert_eq!(parse_cidr("fe80::1/64").unwrap().1, 64);
    }

    #[test]
    fn a_mac_address_has_six_octets() {
        assert_eq!(parse_mac("02:00:00:00:00:ff").unwrap(), [2, 0, 0, 0, 0, 255]);
        assert!(parse_mac("02:00").is_err());
        assert!(parse_mac("02:00:00:00:00:zz").is_err());
    }
}
