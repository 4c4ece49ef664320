//! Builds what a guest boots from: a kernel, an initrd and a root filesystem, each from inputs that are named in a
//! recipe and recorded in a manifest. Same inputs, same bytes.
//!
//! ```text
//! recipe (TOML) ─► build ─┬─► kernel   Debian's package, or its source with our configuration
//!                         ├─► initrd   agent + kernel modules + load order, as a cpio archive
//!                         └─► rootfs   agent, or a Debian system around it, as erofs or ext4, with dm-verity
//!                    every step goes through the content-addressed cache; the results and `manifest.json` go to --output
//! ```
//!
//! It never installs anything on the machine that it runs on, and downloads only through Debian's apt.

pub mod agent;
pub mod apt;
pub mod build;
pub mod bzimage;
pub mod cache;
pub mod digest;
pub mod error;
pub mod filesystem;
pub mod initrd;
pub mod kernel;
pub mod manifest;
pub mod modules;
pub mod output;
pub mod progress;
pub mod recipe;
pub mod rootfs;
pub mod tool;
pub mod tree;
pub mod verity;

pub use build::{Request, Target, build};
pub use error::{Error, Result};
