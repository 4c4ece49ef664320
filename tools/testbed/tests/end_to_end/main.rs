//! What a user of `ctr` sees: real containerd, real virtual machines, real images. Each test has a containerd of its own
//! and ends by asserting that nothing is left of it.

mod block_rootfs;
mod command;
mod concurrency;
mod crashes;
mod cri;
mod cri_client;
mod cycles;
mod errors;
mod exit;
mod fixture;
mod guest;
mod layered_image;
mod lifecycle;
mod limits;
mod pod;
mod process;
mod sizes;
mod storage;
mod streams;
mod workload;

use std::time::Duration;

/// For one thing to happen in a guest that shares two cores with others.
const LIMIT: Duration = Duration::from_secs(60);
