//! A containerd of one's own: its files, socket and mount namespace are private, and it ends with the value.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{BUSYBOX, Capture, Configuration, Ctr, Installation, Outcome, Scope, leftovers::Baseline};

/// The runtime under test, by the name that containerd knows it by.
pub const CAISSON: &str = "io.containerd.caisson.v2";
/// The runtime that it is compared with. `TESTBED_RUNTIME=io.containerd.runc.v2` runs the tests of behaviour with it, which
/// proves the tests.
pub const RUNC: &str = "io.containerd.runc.v2";

const START_LIMIT: Duration = Duration::from_secs(20);
/// CRI wants a network; the file systems are not there; `opt` would write to /opt and `restart` restarts.
const DISABLED_PLUGINS: [&str; 7] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.restart",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
];

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    scope: Scope,
    child: Child,
    log: Arc<Capture>,
    baseline: Baseline,
    runtime: String,
    next_id: AtomicU32,
}

impl Containerd {
    /// Starts one with what `cargo xtask setup` has built.
    ///
    /// # Errors
    /// When there was no set-up, or as for [`Self::start`].
    pub fn of_this_build() -> Result<Self> {
        Self::start(&Installation::find()?)
    }

    /// Starts one whose sandboxes use QEMU, with the busybox images in it.
    ///
    /// # Errors
    /// When it does not come up; the error has its last words.
    pub fn start(installation: &Installation) -> Result<Self> {
        Self::start_with(installation, &Configuration::for_qemu(installation))
    }

    /// Starts one with a configuration of the test's own.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_with(installation: &Installation, configuration: &Configuration) -> Result<Self> {
        Scope::sweep_abandoned()?;
        let scope = Scope::create()?;
        configuration.write(&scope.dir().join("configuration.toml"))?;
        let (child, log) = spawn(&scope, &installation.programs).or_else(|error| scope.clear().and(Err(error)))?;
        let baseline = Baseline::take(scope.clone(), child.id().cast_signed())?;
        let runtime = env::var("TESTBED_RUNTIME").unwrap_or_else(|_| CAISSON.to_owned());
        let containerd = Self { scope, child, log, baseline, runtime, next_id: AtomicU32::new(1) };
        containerd.import(&installation.archives.busybox)?;
        Ok(containerd)
    }

    /// Adds the images of an archive.
    ///
    /// # Errors
    /// When containerd does not take it.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let outcome = self.ctr(&["images", "import"]).arg(archive.display().to_string()).run()?;
        outcome.success().with_context(|| format!("import {}", archive.display()))?;
        Ok(())
    }

    /// `ctr <arguments>`.
    pub fn ctr(&self, arguments: &[&str]) -> Ctr {
        // Its streams and mounts are seen by containerd only from the same mount namespace.
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.child.id()));
        command.arg("ctr").arg("--address").arg(self.scope.dir().join("c.sock"));
        command.arg("--namespace").arg(self.namespace()).args(arguments);
        Ctr::new(command)
    }

    /// `ctr run --rm <options> busybox <command>`, to its end.
    ///
    /// # Errors
    /// When it takes too long; not when it fails, which is an [`Outcome`].
    pub fn run(&self, options: &[&str], command: &[&str]) -> Result<Outcome> {
        self.prepare(options, BUSYBOX, &self.fresh_id(), command).run()
    }

    /// The same with another runtime.
    ///
    /// # Errors
    /// As for [`Self::run`].
    pub fn run_with(&self, runtime: &str, options: &[&str], command: &[&str]) -> Result<Outcome> {
        self.prepare_with(runtime, options, BUSYBOX, &self.fresh_id(), command).run()
    }

    /// `ctr run --rm <options> <image> <id> <command>`, not started yet.
    pub fn prepare(&self, options: &[&str], image: &str, id: &str, command: &[&str]) -> Ctr {
        self.prepare_with(&self.runtime, options, image, id, command)
    }

    /// The same with another runtime.
    pub fn prepare_with(&self, runtime: &str, options: &[&str], image: &str, id: &str, command: &[&str]) -> Ctr {
        self.ctr(&["run", "--rm", "--runtime", runtime]).args(options).args(&[image, id]).args(command)
    }

    /// `ctr run --detach <options> busybox <command>`; gives the container's id.
    ///
    /// # Errors
    /// When the container does not start.
    pub fn run_detached(&self, options: &[&str], command: &[&str]) -> Result<String> {
        let id = self.fresh_id();
        let ctr = self.ctr(&["run", "--detach", "--runtime", &self.runtime]).args(options).args(&[BUSYBOX, &id]);
        ctr.args(command).run()?.success()?;
        Ok(id)
    }

    /// `ctr tasks exec <id> <command>`, not started yet.
    pub fn exec(&self, id: &str, command: &[&str]) -> Ctr {
        self.ctr(&["tasks", "exec", "--exec-id", &self.fresh_id(), id]).args(command)
    }

    /// Kills a container if it runs, and removes it.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.ctr(&["tasks", "rm", "--force", id]).run()?.success()?;
        self.ctr(&["containers", "rm", id]).run()?.success()?;
        Ok(())
    }

    /// An id that no container has had.
    pub fn fresh_id(&self) -> String {
        format!("{}-{}", self.scope.name(), self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// The containerd namespace of everything in here.
    pub fn namespace(&self) -> String {
        self.scope.name()
    }

    /// What belongs to this containerd.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// containerd's log, and so the shims' too.
    pub fn log(&self) -> &Capture {
        &self.log
    }

    /// A configuration file beside the one in force, for `--runtime-config-path`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_configuration(&self, name: &str, configuration: &Configuration) -> Result<PathBuf> {
        let path = self.scope.dir().join(name);
        configuration.write(&path)?;
        Ok(path)
    }

    /// What containers have left behind, one line each.
    ///
    /// # Errors
    /// When the machine's state cannot be read.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        self.baseline.leftovers()
    }

    /// # Panics
    /// When containers have left a process, a mount, a control group, a socket or a file behind: names each.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        match self.leftovers() {
            Ok(left) => assert!(left.is_empty(), "left behind:\n{}\nlog:\n{}", left.join("\n"), self.log.text()),
            Err(error) => panic!("cannot tell what is left behind: {error:#}"),
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if let Err(error) = self.scope.clear() {
            eprintln!("clean up after containerd: {error:#}");
        }
    }
}

fn spawn(scope: &Scope, programs: &Path) -> Result<(Child, Arc<Capture>)> {
    let dir = scope.dir();
    let config = dir.join("containerd.toml");
    fs::write(&config, settings(dir)).context("write containerd's configuration")?;
    let ready = UnixDatagram::bind(dir.join("ready.sock")).context("listen for containerd's readiness")?;
    fs::create_dir_all("/run/containerd").context("make /run/containerd")?;

    let mut command = Command::new("setpriv");
    // However this process ends, containerd ends with it, and with containerd its mounts.
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "sh", "-c"]);
    // The shims' sockets are in /run/containerd, whatever the configuration says.
    command.arg("mount -t tmpfs tmpfs /run/containerd && exec containerd --config \"$0\"").arg(&config);
    command.env("PATH", path_with(programs));
    command.env("CAISSON_RUN_DIR", scope.run_dir());
    command.env("CAISSON_CONF_FILE", dir.join("configuration.toml"));
    command.env("NOTIFY_SOCKET", dir.join("ready.sock"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("execute setpriv")?;
    let log = child.stderr.take().map_or_else(Capture::empty, Capture::of);

    match wait_until_ready(&child, &ready) {
        Ok(()) => Ok((child, log)),
        Err(error) => {
            child.kill().ok();
            child.wait().ok();
            log.wait_for_end(START_LIMIT).ok();
            Err(error.context(format!("start containerd: {}", log.text())))
        }
    }
}

fn settings(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\ndisabled_plugins = {DISABLED_PLUGINS:?}\n\
         [grpc]\naddress = \"{dir}/c.sock\"\n[ttrpc]\naddress = \"{dir}/c.sock.ttrpc\"\n"
    )
}

/// containerd says `READY=1` on `NOTIFY_SOCKET`, `sd_notify(3)`.
fn wait_until_ready(child: &Child, ready: &UnixDatagram) -> Result<()> {
    let pid = Pid::from_raw(child.id().cast_signed()).context("process id out of range")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("watch containerd")?;
    let limit = Timespec::try_from(START_LIMIT)?;
    let mut watched = [PollFd::new(ready, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut watched, Some(&limit))).context("wait for containerd")?;
    if watched[0].revents().contains(PollFlags::IN) {
        Ok(())
    } else if watched[1].revents().contains(PollFlags::IN) {
        bail!("it ended at once")
    } else {
        bail!("it was not ready within {START_LIMIT:?}")
    }
}

fn path_with(programs: &Path) -> OsString {
    let mut path = programs.as_os_str().to_owned();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    path
}
