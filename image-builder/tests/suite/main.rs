//! The crate from outside: its command, and its images against cryptsetup, QEMU and themselves.

mod boot;
mod command;
mod common;
mod reproducible;
mod verity;
