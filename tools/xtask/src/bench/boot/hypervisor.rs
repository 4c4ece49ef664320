//! Who takes part: caisson's own launcher and QEMU, and the others whose programs are there. Each boots the guest with
//! its serial console on standard output, in the leanest way that its documentation describes.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use caisson_testbed::Installation;
use nix::{
    fcntl::OFlag,
    pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt},
};
use serde_json::json;

use super::guest::{Guest, PARAMETERS};
use crate::peers;

/// Among a hypervisor's arguments: the path of a terminal that each boot has of its own.
const TERMINAL: &str = "{terminal}";
/// The one that the others are held against.
pub const OURS: &str = "builtin";

/// One way to boot the guest.
#[derive(Debug)]
pub struct Candidate {
    /// What people call it.
    pub name: String,
    program: PathBuf,
    arguments: Vec<String>,
}

impl Candidate {
    /// Everyone who is there.
    pub fn all(installation: &Installation, guest: &Guest, folder: &Path) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        let builtin = installation.programs.join("caisson-vmm-builtin");
        if builtin.exists() {
            all.push(Self::new(OURS, builtin, caisson(guest)));
        }
        all.push(Self::new("qemu microvm", installation.qemu.clone(), qemu(guest, "microvm,pit=on,pic=on,rtc=on")));
        all.push(Self::new("qemu q35", installation.qemu.clone(), qemu(guest, "q35")));
        let Some(programs) = env::var_os(peers::FOLDER).map(PathBuf::from) else { return Ok(all) };
        for (name, arguments) in [
            ("firecracker", firecracker(guest, folder)?),
            ("cloud-hypervisor", cloud_hypervisor(guest)),
            ("stratovirt", stratovirt(guest, folder)),
        ] {
            let program = programs.join(name);
            if program.exists() {
                all.push(Self::new(name, program, arguments));
            }
        }
        Ok(all)
    }

    fn new(name: &str, program: PathBuf, arguments: Vec<String>) -> Self {
        Self { name: name.to_owned(), program, arguments }
    }

    /// Not started yet; and the terminal that its console is on, if that is not standard output. With `pid_file`, `sh` starts
    /// it, which first writes its process id there.
    pub fn command(&self, pid_file: Option<&Path>) -> Result<(Command, Option<PtyMaster>)> {
        let terminal = self.arguments.iter().any(|argument| argument.contains(TERMINAL)).then(open_terminal);
        let (terminal, name) = terminal.transpose().context("make a terminal")?.unzip();
        let mut command = match pid_file {
            None => Command::new(&self.program),
            Some(file) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(file).arg(&self.program);
                shell
            }
        };
        let name = name.unwrap_or_default();
        command.args(self.arguments.iter().map(|argument| argument.replace(TERMINAL, &name)));
        Ok((command, terminal))
    }
}

/// One that nobody types at, and the path of its other end.
fn open_terminal() -> nix::Result<(PtyMaster, String)> {
    let terminal = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    grantpt(&terminal)?;
    unlockpt(&terminal)?;
    let name = ptsname_r(&terminal)?;
    Ok((terminal, name))
}

fn caisson(guest: &Guest) -> Vec<String> {
    let memory = guest.memory_mib.to_string();
    strings(&["run", "--kernel", &path(&guest.vmlinux), "--initrd", &path(&guest.initrd), "--memory", &memory])
}

fn qemu(guest: &Guest, machine: &str) -> Vec<String> {
    let (machine, memory) = (format!("{machine},accel=kvm"), format!("{}M", guest.memory_mib));
    let (kernel, initrd) = (path(&guest.vmlinux), path(&guest.initrd));
    let hardware =
        ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", &machine, "-cpu", "host"];
    let guest = ["-m", &memory, "-serial", "stdio", "-kernel", &kernel, "-initrd", &initrd, "-append", PARAMETERS];
    strings(&[&hardware[..], &guest].concat())
}

fn firecracker(guest: &Guest, folder: &Path) -> Result<Vec<String>> {
    let file = folder.join("firecracker.json");
    let configuration = json!({
        "boot-source": { "kernel_image_path": guest.vmlinux, "initrd_path": guest.initrd, "boot_args": PARAMETERS },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": guest.memory_mib },
    });
    fs::write(&file, configuration.to_string()).context("write Firecracker's configuration")?;
    Ok(strings(&["--no-api", "--config-file", &path(&file)]))
}

fn cloud_hypervisor(guest: &Guest) -> Vec<String> {
    let memory = format!("size={}M", guest.memory_mib);
    let (kernel, initrd) = (path(&guest.vmlinux), path(&guest.initrd));
    let devices = ["--cpus", "boot=1", "--memory", &memory, "--serial", "tty", "--console", "off"];
    strings(&[&devices[..], &["--kernel", &kernel, "--initramfs", &initrd, "--cmdline", PARAMETERS]].concat())
}

/// It asks for a control socket, and reads what it has written to a pipe.
fn stratovirt(guest: &Guest, folder: &Path) -> Vec<String> {
    let memory = format!("{}M", guest.memory_mib);
    let serial = format!("file,path={TERMINAL}");
    let control = format!("unix:{},server,nowait", path(&folder.join("stratovirt.sock")));
    let (kernel, initrd) = (path(&guest.bz_image), path(&guest.initrd));
    let devices = ["-machine", "microvm", "-smp", "1", "-m", &memory, "-serial", &serial];
    let guest = ["-kernel", &kernel, "-initrd", &initrd, "-append", PARAMETERS, "-qmp", &control];
    strings(&[&devices[..], &guest].concat())
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
