//! The launcher for QEMU as the shim sees it: a process that serves the Vmm contract, with real guests.
//!
//! Guests need what `cargo xtask setup` leaves, or `$CAISSON_TEST_KERNEL` and `$CAISSON_TEST_INITRD`.

mod fixture;

mod devices;
mod life;
mod refusals;
mod terminal;
