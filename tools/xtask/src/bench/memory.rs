//! What an idle pod costs: memory on the host and in the guest, and the guest image's size.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result};
use caisson_testbed::{Containerd, Installation, program_name};
use procfs::process::Process;

/// Bytes by what they are for.
pub type Sizes = BTreeMap<String, u64>;

/// The proportional set size of every process of one idle pod, by the program's name.
pub fn measure(containerd: &Containerd) -> Result<Sizes> {
    // `sleep` as the container's only process, started and left alone.
    let id = containerd.run_detached(&[], &["sleep", "3600"])?;
    let mut sizes = Sizes::new();
    for process in containerd.scope().processes()? {
        let name = program_name(&process);
        if name != "containerd" {
            *sizes.entry(name).or_default() += proportional_set_size(&process)?;
        }
    }
    containerd.remove(&id)?;
    Ok(sizes)
}

/// The files that the guest boots from.
pub fn guest_image(installation: &Installation) -> Result<Sizes> {
    let files = [("kernel", &installation.kernel), ("root file system", &installation.initrd)];
    let size = |(name, path): (&str, &std::path::PathBuf)| {
        let length = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?.len();
        Ok((name.to_owned(), length))
    };
    files.into_iter().map(size).collect()
}

/// `Pss` of /proc/<pid>/smaps_rollup, `proc_pid_smaps(5)`.
fn proportional_set_size(process: &Process) -> Result<u64> {
    let rollup = process.smaps_rollup().with_context(|| format!("read the memory of process {}", process.pid))?;
    let total = rollup.memory_map_rollup.iter().filter_map(|map| map.extension.map.get("Pss")).sum();
    Ok(total)
}
