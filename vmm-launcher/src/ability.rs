//! What a hypervisor can do or cannot, in the words of `Capabilities`.

use caisson_protocol::vmm::CapabilitiesResponse;

/// One thing that some hypervisors can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// Give a guest this kind of device.
    Device(&'static str),
    /// Give it while the guest runs, and take it away.
    Hotplug(&'static str),
    /// An optional operation.
    Operation(&'static str),
}

impl Ability {
    /// Tells whether it `can` be done, or why it cannot.
    pub fn tell(self, can: Result<(), String>, told: &mut CapabilitiesResponse) {
        let (list, name, missing) = match self {
            Self::Device(kind) => (&mut told.devices, kind, kind.to_owned()),
            Self::Hotplug(kind) => (&mut told.hotplug, kind, format!("{kind}-hotplug")),
            Self::Operation(name) => (&mut told.operations, name, name.to_owned()),
        };
        match can {
            Ok(()) => list.push(name.to_owned()),
            Err(why) => drop(told.missing.insert(missing, why)),
        }
    }
}

/// What a launcher never has its hypervisor do, with the reasons.
pub fn never(reasons: &[(&str, &str)], told: &mut CapabilitiesResponse) {
    told.missing.extend(reasons.iter().map(|&(what, why)| (what.to_owned(), why.to_owned())));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_done_is_listed_where_it_belongs() {
        let mut told = CapabilitiesResponse::default();
        for ability in [Ability::Device("fs"), Ability::Hotplug("net"), Ability::Operation("pause")] {
            ability.tell(Ok(()), &mut told);
        }
        assert_eq!(
            (told.devices, told.hotplug, told.operations),
            (vec!["fs".into()], vec!["net".into()], vec!["pause".into()])
        );
        assert!(told.missing.is_empty());
    }

    #[test]
    fn what_cannot_be_done_is_missing_by_the_contracts_word() {
        let mut told = CapabilitiesResponse::default();
        for ability in [Ability::Device("fs"), Ability::Hotplug("net"), Ability::Operation("pause")] {
            ability.tell(Err("no such thing".into()), &mut told);
        }
        let mut missing: Vec<_> = told.missing.keys().collect();
        missing.sort();
        assert_eq!(missing, ["fs", "net-hotplug", "pause"]);
        assert!(told.devices.is_empty() && told.hotplug.is_empty() && told.operations.is_empty());
    }
}
