//! What every new sandbox is born with: configuration files resolved into one checked `SandboxConfig`.
//!
//! ```text
//! shim ── client ──► service ──► Configurations ──► Resolver:  find → load → merge drop-ins → choose → check → annotate
//! ```
//! The library knows the keys that every hypervisor has. A backend's own keys come from its launcher, so a new backend
//! changes nothing here.

pub mod client;

pub mod configurations;
pub mod idle;
pub mod service;

pub mod resolve;
pub mod switch;

pub mod check;
pub mod hypervisor;
pub mod installation;
pub mod keys;
pub mod launchers;
pub mod problem;

pub mod defaults;
pub mod reference;
pub mod units;

mod annotations;
mod atomic;
mod changes;
mod document;
mod files;
mod host;
mod key_doc;
mod last_good;
mod load;
mod rules;
mod sizing;
mod sys;
mod watch;
