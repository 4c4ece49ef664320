//! Where a hypervisor runs that has no such thing of its own that fits: a mount namespace with nothing in it but the
//! VM's own files, a user that exists nowhere else on the host, and no privilege but to open these files.
//!
//! ```text
//!  launcher ──fork, exec──► itself, `jail <order>` ──mounts, user──exec──► the hypervisor: the same process
//! ```
//!
//! The kernel removes every mount with the namespace, so there is nothing to clean up; unlike Firecracker's jailer it
//! copies nothing, leaves the descriptors alone, and the hypervisor dies with the launcher unless it is to outlive it. As
//! the launcher executes itself, the work is done by a process with one thread and no `fork` behind it.

use std::{
    convert::Infallible,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl::{set_no_new_privs, set_pdeathsig},
        signal::Signal,
    },
    unistd::{Gid, Uid, chdir, getpid, getppid, pivot_root, setgroups, setresgid, setresuid},
};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
    thread::{
        CapabilitySet, CapabilitySets, configure_capability_in_ambient_set, remove_capability_from_bounding_set,
        set_capabilities, set_keep_capabilities,
    },
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::{
    Error, Result,
    outlive::Lifetime,
    process::{Process, Streams},
    sys,
};

/// The first argument of a launcher that is to become a hypervisor in a jail.
const SUBCOMMAND: &str = "jail";
/// Each jail has a user of its own: this and the launcher's process id, which is below 2²² (`PID_MAX_LIMIT`).
const FIRST_USER: u32 = 0x7000_0000;
/// The jail's root directory holds empty files and directories, on which others are mounted.
const ROOT_SIZE: &str = "size=1m,nr_inodes=1k,mode=755";
/// Where the root is mounted until it becomes the root: a directory that every host has and no jail needs.
const ROOT: &str = "/proc";
/// What a dynamically linked program loads.
const LIBRARIES: [&str; 3] = ["/lib", "/lib64", "/usr/lib"];
/// The files belong to root and other users. In here are only those that the VM has.
const OPENS_FILES: CapabilitySet = CapabilitySet::DAC_OVERRIDE;
/// The exit status of a launcher that was executed to show something where something is: `EEXIST`.
const TAKEN: u8 = 17;
/// A handful of system calls.
const SHOW_DEADLINE: Duration = Duration::from_secs(10);

/// What a hypervisor gets to see.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Jail {
    directories: Vec<PathBuf>,
    files: Vec<Shown>,
    /// Whose end is the hypervisor's end.
    parent: Option<i32>,
    user: u32,
    #[serde(skip)]
    lifetime: Lifetime,
}

/// A file or directory of the host.
#[derive(Debug, Deserialize, Serialize)]
struct Shown {
    outside: PathBuf,
    inside: PathBuf,
    writable: bool,
}

/// What the launcher executes itself for.
#[derive(Debug, Deserialize, Serialize)]
enum Order {
    Enter(Jail),
    Show { jailed: u32, file: Shown },
    Hide { jailed: u32, inside: PathBuf },
}

impl Jail {
    /// Shows `outside`, a file or directory, at `inside`. Devices are devices, also where they are not writable.
    pub fn show(&mut self, outside: impl Into<PathBuf>, inside: impl Into<PathBuf>, writable: bool) {
        self.files.push(Shown { outside: outside.into(), inside: inside.into(), writable });
    }

    /// Has an empty directory at `inside`, for what is shown later.
    pub fn make_directory(&mut self, inside: impl Into<PathBuf>) {
        self.directories.push(inside.into());
    }

    /// Lets the hypervisor live as long as `lifetime` says, and not only as long as the launcher.
    pub fn let_live(&mut self, lifetime: &Lifetime) {
        self.lifetime = lifetime.clone();
    }

    /// Starts `program`, a path on the host, in the jail; `descriptors` keep their numbers. Must be called on the thread that lives as long as the launcher.
    ///
    /// # Errors
    /// When this program cannot be executed again. What fails afterwards is `program`'s end, with its last words.
    pub fn start(
        mut self,
        program: &Path,
        arguments: &[String],
        descriptors: Vec<OwnedFd>,
        streams: Streams,
    ) -> Result<Process> {
        for directory in LIBRARIES.iter().filter(|directory| Path::new(directory).is_dir()) {
            self.show(*directory, *directory, false);
        }
        let inside = inside(program);
        self.show(program, &inside, false);
        let lifetime = self.lifetime.clone();
        self.parent = (!lifetime.is_longer()).then(|| getpid().as_raw());
        self.user = FIRST_USER + std::process::id();
        let mut order = order(&Order::Enter(self));
        order.push(inside.to_string_lossy().into_owned());
        order.extend_from_slice(arguments);
        let process = Process::start_with(Path::new("/proc/self/exe"), &order, descriptors, streams, &lifetime)?;
        Ok(process.becomes(program))
    }
}

/// Where a jailed `program` sees itself.
pub fn inside(program: &Path) -> PathBuf {
    Path::new("/").join(program.file_name().unwrap_or_default())
}

/// Shows `outside` to a process in a jail that runs already.
///
/// # Errors
/// [`Error::Invalid`] when there is something at `inside`; when it cannot be mounted there.
pub async fn show(jailed: u32, outside: &Path, inside: &Path, writable: bool) -> Result<()> {
    let file = Shown { outside: outside.to_owned(), inside: inside.to_owned(), writable };
    execute(&Order::Show { jailed, file }).await
}

/// Takes away what [`show`] showed at `inside`.
///
/// # Errors
/// When it cannot be unmounted.
pub async fn hide(jailed: u32, inside: &Path) -> Result<()> {
    execute(&Order::Hide { jailed, inside: inside.to_owned() }).await
}

async fn execute(what: &Order) -> Result<()> {
    let process = Process::start(Path::new("/proc/self/exe"), &order(what), Vec::new())?;
    match timeout(SHOW_DEADLINE, process.ended()).await {
        Ok(ended) if ended.well() => Ok(()),
        Ok(ended) if ended.status.and_then(|status| status.code()) == Some(TAKEN.into()) => {
            Err(Error::Invalid(ended.stderr))
        }
        Ok(ended) => Err(Error::Hypervisor(ended.stderr)),
        Err(_) => Err(Error::Hypervisor("the hypervisor's jail cannot be changed in time".into())),
    }
}

fn order(order: &Order) -> Vec<String> {
    vec![SUBCOMMAND.to_owned(), serde_json::to_string(order).expect("paths of requests are UTF-8")]
}

/// The version of the host's Landlock, for hypervisors that confine themselves by it; 0 where there is none.
pub fn landlock_version() -> u32 {
    sys::landlock_version()
}

/// What `main` calls first: does what this program was executed for by itself, if it was.
pub fn obey() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(SUBCOMMAND) {
        return None;
    }
    let order = arguments.next().unwrap_or_default();
    let done =
        serde_json::from_str(&order).context("\"jail\" is for this program itself").and_then(|order| match order {
            Order::Enter(jail) => enter(&jail, arguments).map(|never| match never {}),
            Order::Show { jailed, file } => join(jailed, Some(&file.outside), |tree| show_tree(tree, &file)),
            Order::Hide { jailed, inside } => join(jailed, None, |_| {
                umount2(&inside, MntFlags::MNT_DETACH).with_context(|| format!("unmount {}", inside.display()))?;
                remove_target(&inside)
            }),
        });
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            let source = error.root_cause().downcast_ref::<io::Error>();
            let taken = source.is_some_and(|source| source.kind() == io::ErrorKind::AlreadyExists);
            if taken { ExitCode::from(TAKEN) } else { ExitCode::FAILURE }
        }
    })
}

fn enter(jail: &Jail, mut command: impl Iterator<Item = String>) -> anyhow::Result<Infallible> {
    let program = command.next().context("\"jail\" needs a program")?;
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace for the hypervisor")?;
    make_root(&jail.directories, &jail.files)?;
    become_root().context("make the hypervisor's jail its root directory")?;
    become_user(jail.user).context("give the hypervisor a user of its own")?;
    if let Some(parent) = jail.parent {
        // Forgotten by the kernel when the user changed.
        set_pdeathsig(Signal::SIGKILL).context("ask for a signal at the parent's death")?;
        ensure!(getppid().as_raw() == parent, "the launcher has ended");
    }
    Err(Command::new(&program).args(command).exec()).with_context(|| format!("execute {program} in its jail"))
}

fn make_root(directories: &[PathBuf], files: &[Shown]) -> anyhow::Result<()> {
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_PRIVATE | MsFlags::MS_REC, nothing).context("keep mounts to itself")?;
    mount(Some("tmpfs"), ROOT, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(ROOT_SIZE))
        .context("mount the hypervisor's root directory")?;
    let in_root = |inside: &Path| Path::new(ROOT).join(inside.strip_prefix("/").unwrap_or(inside));
    for directory in directories {
        fs::create_dir_all(in_root(directory)).with_context(|| format!("make {}", directory.display()))?;
    }
    for file in files {
        let target = in_root(&file.inside);
        make_target(&target, file.outside.is_dir())
            .and_then(|()| Ok(mount(Some(&file.outside), &target, nothing, MsFlags::MS_BIND, nothing)?))
            .and_then(|()| restrict(&target, file.writable))
            .with_context(|| format!("show {} to the hypervisor", file.outside.display()))?;
    }
    Ok(())
}

/// Something to mount a file or a directory on. What is there may be a file of the host, and stays as it is.
fn make_target(target: &Path, is_dir: bool) -> anyhow::Result<()> {
    fs::create_dir_all(target.parent().context("it has no directory")?)?;
    let made = if is_dir { fs::create_dir(target) } else { File::create_new(target).map(drop) };
    made.with_context(|| format!("make {}", target.display()))
}

fn remove_target(target: &Path) -> anyhow::Result<()> {
    Ok(fs::remove_file(target).or_else(|_| fs::remove_dir(target))?)
}

fn restrict(target: &Path, writable: bool) -> anyhow::Result<()> {
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID;
    flags.set(MsFlags::MS_RDONLY, !writable);
    // What can be written must not be executed, nor made a device.
    flags.set(MsFlags::MS_NOEXEC, writable);
    flags.set(MsFlags::MS_NODEV, writable && fs::metadata(target)?.is_dir());
    Ok(mount(None::<&str>, target, None::<&str>, flags, None::<&str>)?)
}

fn become_root() -> anyhow::Result<()> {
    chdir(ROOT)?;
    // The old root is on top of the new one, and goes: pivot_root(2), "pivot_root(".", ".")".
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(chdir("/")?)
}

fn become_user(user: u32) -> anyhow::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        // The kernel does not know those after its last.
        if capability != OPENS_FILES && remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    set_keep_capabilities(true)?;
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    let kept = OPENS_FILES;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: kept })?;
    configure_capability_in_ambient_set(kept, true)?;
    Ok(set_no_new_privs()?)
}

/// Does `work` in the mount namespace of process `jailed`, with what is mounted at `outside` in this one.
fn join(
    jailed: u32,
    outside: Option<&Path>,
    work: impl FnOnce(Option<OwnedFd>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = outside.map(|path| open_tree(CWD, path, clone).with_context(|| format!("open {}", path.display())));
    let tree = tree.transpose()?;
    let namespace = File::open(format!("/proc/{jailed}/ns/mnt")).context("find the hypervisor's jail")?;
    setns(&namespace, CloneFlags::CLONE_NEWNS).context("enter the hypervisor's jail")?;
    work(tree)
}

fn show_tree(tree: Option<OwnedFd>, file: &Shown) -> anyhow::Result<()> {
    let tree = tree.context("nothing to show")?;
    let inside = &file.inside;
    let shown = || -> anyhow::Result<()> {
        move_mount(tree.as_fd(), "", CWD, inside, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        restrict(inside, file.writable).inspect_err(|_| {
            let _ = umount2(inside, MntFlags::MNT_DETACH);
        })
    };
    let is_dir = File::from(tree.try_clone()?).metadata()?.is_dir();
    make_target(inside, is_dir)
        // What was made in vain would be in the way of the next attempt.
        .and_then(|()| shown().inspect_err(|_| drop(remove_target(inside))))
        .with_context(|| format!("show {} to the hypervisor", file.outside.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_already_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disks/root");
        make_target(&disk, false).unwrap();
        fs::write(&disk, "data").unwrap();
        for is_dir in [false, true] {
            let refusal = make_target(&disk, is_dir).unwrap_err();
            let source = refusal.root_cause().downcast_ref::<io::Error>().unwrap();
            assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
        }
        assert_eq!(fs::read(&disk).unwrap(), b"data");
    }
}
