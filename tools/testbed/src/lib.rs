//! A private containerd with caisson installed in it: what the demo, the benches and the end-to-end tests stand on.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use caisson_testbed::Containerd;
//!
//! let containerd = Containerd::of_this_build()?;
//! let outcome = containerd.run(&[], &["echo", "hello"])?;
//! assert_eq!(outcome.stdout_text(), "hello\n");
//! containerd.assert_nothing_left();
//! # Ok(())
//! # }
//! ```
//!
//! Nothing here belongs to the product, and nothing here touches the machine's own containerd: the private one has its
//! own files, its own socket and its own mount namespace.

mod cache;
mod capture;
mod configuration;
mod containerd;
mod ctr;
mod daemon;
mod hypervisor;
pub mod image;
mod images;
mod installation;
mod kvm;
mod leftovers;
mod results;
mod scope;
mod session;

pub use cache::Cache;
pub use capture::{Capture, Line};
pub use configuration::Configuration;
pub use containerd::{CAISSON, Containerd, RUNC};
pub use ctr::Ctr;
pub use hypervisor::Hypervisor;
pub use images::{Archives, BUSYBOX, BUSYBOX_APP, NGINX, PAUSE};
pub use installation::{Guest, Installation};
pub use kvm::Accelerator;
pub use results::{Recording, TestResult, Verdict, skip, version_of};
pub use scope::{Scope, kill, program_name};
pub use session::{Outcome, Session};
