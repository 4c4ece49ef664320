//! The launchers as the shim sees them: processes that serve the Vmm contract, with real guests. The same tests run for
//! each backend that can run here; a test's name says for which: `life::builtin::a_guest_…`.
//!
//! The launchers are those beside the one that cargo has built for this test, or in `$CAISSON_LAUNCHERS`.
//! Cloud Hypervisor and Firecracker are those in `$CAISSON_HYPERVISORS`, or the host's.
//! Guests need what `cargo xtask setup` leaves, or `$CAISSON_TEST_KERNEL` and `$CAISSON_TEST_INITRD`.

mod fixture;
mod network;
mod pattern;

mod adoption;
mod balloon;
mod capabilities;
mod cards;
mod cycles;
mod devices;
mod disks;
mod integrity;
mod life;
mod memory;
mod refusals;
mod sizes;
mod snapshot;
mod terminal;
mod vfio;
