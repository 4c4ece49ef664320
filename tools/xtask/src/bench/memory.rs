//! What an idle pod costs: memory on the host and in the guest, and the guest image's size.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result};
use caisson_testbed::{Containerd, Installation, program_name};
use procfs::process::Process;

/// Bytes by what they are for.
pub type Sizes = BTreeMap<String, u64>;

/// The agent's name in the sizes.
pub const AGENT: &str = "caisson-agent (in the guest, resident)";

/// What one idle pod takes: the proportional set size of each of its processes on the host, by the program's name, and
/// the resident set of the agent in the guest.
pub fn measure(containerd: &Containerd) -> Result<Sizes> {
    let id = containerd.run_detached(&[], &["sleep", "3600"])?;
    let mut sizes = Sizes::new();
    for process in containerd.scope().processes()? {
        let name = program_name(&process);
        if name != "containerd" {
            *sizes.entry(name).or_default() += proportional_set_size(&process)?;
        }
    }
    containerd.remove(&id)?;
    sizes.insert(AGENT.to_owned(), agent(containerd)?);
    Ok(sizes)
}

/// The agent is process 1 of the guest, which a container sees that joins the guest's own pid namespace.
fn agent(containerd: &Containerd) -> Result<u64> {
    let outcome = containerd.run(&["--with-ns", "pid:/proc/1/ns/pid"], &["cat", "/proc/1/status"])?.success()?;
    let status = outcome.stdout_text();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    let kibibytes: u64 = resident.and_then(|text| text.parse().ok()).context("the agent's status has no VmRSS")?;
    Ok(kibibytes * 1024)
}

/// The files that the guest boots from.
pub fn guest_image(installation: &Installation) -> Result<Sizes> {
    let files = [("kernel", &installation.guest.kernel), ("root file system", &installation.guest.initrd)];
    let size = |(name, path): (&str, &std::path::PathBuf)| {
        let length = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?.len();
        Ok((name.to_owned(), length))
    };
    files.into_iter().map(size).collect()
}

/// `Pss` of /proc/<pid>/smaps_rollup, `proc_pid_smaps(5)`.
pub fn proportional_set_size(process: &Process) -> Result<u64> {
    let rollup = process.smaps_rollup().with_context(|| format!("read the memory of process {}", process.pid))?;
    let total = rollup.memory_map_rollup.iter().filter_map(|map| map.extension.map.get("Pss")).sum();
    Ok(total)
}
