//! `caisson sandbox inspect`.

use std::{path::PathBuf, time::SystemTime};

use serde::Serialize;

use super::{client::Shim, found::Record, list::age};
use crate::output::{Format, table};

/// All there is to tell of one sandbox.
#[derive(Serialize)]
struct Inspected {
    #[serde(flatten)]
    record: Record,
    directory: PathBuf,
    configuration: String,
    guest: Guest,
    containers: Vec<Container>,
}

#[derive(Serialize)]
struct Guest {
    kernel: String,
    agent: String,
    vcpus: u32,
    memory_mib: u64,
}

#[derive(Serialize)]
struct Container {
    id: String,
    status: String,
    bundle: String,
}

pub(super) async fn run(name: &str, format: Format) -> anyhow::Result<()> {
    let shim = Shim::of(name).await?;
    let told = shim.inspect().await?;
    let guest = told.guest.unwrap_or_default();
    let inspected = Inspected {
        record: shim.record,
        directory: shim.dir,
        configuration: told.configuration,
        guest: Guest {
            kernel: harmless(&guest.kernel_release),
            agent: harmless(&guest.agent_version),
            vcpus: guest.vcpus,
            memory_mib: guest.memory_bytes >> 20,
        },
        containers: told
            .containers
            .into_iter()
            .map(|container| Container { id: container.id, status: container.status, bundle: container.bundle })
            .collect(),
    };
    format.print(&inspected, |inspected| text(inspected, SystemTime::now()))
}

fn text(sandbox: &Inspected, now: SystemTime) -> String {
    let Inspected { record, guest, .. } = sandbox;
    let mut facts = table(&[]);
    for (name, fact) in [
        ("sandbox", record.id.clone()),
        ("namespace", record.namespace.clone()),
        ("age", age(record, now)),
        ("hypervisor", record.hypervisor.clone()),
        ("configuration", sandbox.configuration.clone()),
        ("directory", sandbox.directory.display().to_string()),
        ("processes", format!("shim {}, launcher {}, vmm {}", record.shim_pid, record.launcher_pid, record.vmm_pid)),
        ("guest", format!("Linux {}, caisson-agent {}", guest.kernel, guest.agent)),
        ("size", format!("{} vCPU, {} MiB", guest.vcpus, guest.memory_mib)),
    ] {
        facts.add_row([name, &fact]);
    }
    for column in facts.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut containers = table(&["CONTAINER", "STATUS", "BUNDLE"]);
    for container in &sandbox.containers {
        containers.add_row([&container.id, &container.status, &container.bundle]);
    }
    format!("{}\n\n{}", facts.trim_fmt(), containers.trim_fmt())
}

/// The guest's words without what a terminal would obey.
fn harmless(words: &str) -> String {
    words.escape_debug().to_string()
}
