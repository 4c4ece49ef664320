//! What every new sandbox is born with: configuration files resolved into one checked `SandboxConfig`.
//!
//! ```text
//! shim ── client ──► service ──► Configurations ──► Resolver:  find → load → merge drop-ins → choose → check
//! ```
//! The library knows the keys that every hypervisor has. A backend's own keys come from its launcher, so a new backend
//! changes nothing here.

pub mod client;

pub mod configurations;
pub mod idle;
pub mod service;

pub mod resolve;

pub mod check;
pub mod installation;
pub mod keys;
pub mod problem;

mod backend;
mod document;
mod files;
mod hypervisor;
mod load;
mod rules;
mod watch;
