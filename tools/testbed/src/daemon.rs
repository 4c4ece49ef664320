//! The containerd process: how it is set up, started in a mount namespace of its own, and known to be ready.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    os::{fd::AsRawFd, unix::net::UnixDatagram},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::{CAISSON, Capture, PAUSE, Scope};

const START_LIMIT: Duration = Duration::from_secs(20);
/// However this process ends, containerd ends with it.
const END_WITH_PARENT: [&str; 3] = ["setpriv", "--pdeathsig", "KILL"];
/// Kubernetes' interface; it wants a network.
const CRI: &str = "io.containerd.grpc.v1.cri";
/// The file systems are not there; `opt` would write to /opt and `restart` restarts.
const DISABLED_PLUGINS: [&str; 6] = [
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.restart",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
];

/// A containerd that is ready.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: Arc<Capture>,
}

impl Daemon {
    /// Starts it in a new mount namespace. `programs` comes first in its `PATH`. With `handlers`, it serves Kubernetes'
    /// CRI, with a runtime for each of them whose configuration is `<handler>.toml` in the scope's directory.
    ///
    /// # Errors
    /// When it does not become ready; the error has its last words.
    pub fn start(scope: &Scope, programs: &Path, handlers: &[&str]) -> Result<Self> {
        fs::write(settings_file(scope), settings(scope.dir(), handlers)).context("write containerd's configuration")?;
        // Shims have their sockets in /run/containerd, whatever the configuration says.
        fs::create_dir_all("/run/containerd").context("make /run/containerd")?;
        let script = "mount -t tmpfs tmpfs /run/containerd && exec \"$@\"";
        Self::spawn(scope, programs, &["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh"])
    }

    /// Kills it and starts another one in the same mount namespace.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn replace(&mut self, scope: &Scope, programs: &Path) -> Result<Self> {
        let namespace = File::open(format!("/proc/{}/ns/mnt", self.pid())).context("keep containerd's mounts")?;
        self.end();
        let namespace = format!("--mount=/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
        Self::spawn(scope, programs, &["nsenter", &namespace])
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// What it has logged.
    pub fn log(&self) -> &Capture {
        &self.log
    }

    /// Kills it. What it started lives on.
    pub fn end(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }

    /// `wrapper` is a command that executes its arguments.
    fn spawn(scope: &Scope, programs: &Path, wrapper: &[&str]) -> Result<Self> {
        let dir = scope.dir();
        let (config, socket) = (settings_file(scope), dir.join("ready.sock"));
        // The socket of a predecessor.
        fs::remove_file(&socket).ok();
        let ready = UnixDatagram::bind(&socket).context("listen for containerd's readiness")?;

        let mut command = Command::new(END_WITH_PARENT[0]);
        command.args(&END_WITH_PARENT[1..]).args(wrapper).args(["containerd", "--config"]).arg(&config);
        command.env("PATH", path_with(programs));
        command.env("CAISSON_RUN_DIR", scope.run_dir());
        command.env("CAISSON_CONF_FILE", dir.join("configuration.toml"));
        command.env("NOTIFY_SOCKET", &socket);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("execute setpriv")?;
        let log = child.stderr.take().map_or_else(Capture::empty, Capture::of);

        let mut daemon = Self { child, log };
        if let Err(error) = wait_until_ready(&daemon.child, &ready) {
            daemon.end();
            daemon.log.wait_for_end(START_LIMIT).ok();
            return Err(error.context(format!("start containerd: {}", daemon.log.text())));
        }
        Ok(daemon)
    }
}

fn settings_file(scope: &Scope) -> PathBuf {
    scope.dir().join("containerd.toml")
}

fn settings(dir: &Path, handlers: &[&str]) -> String {
    let mut disabled = DISABLED_PLUGINS.to_vec();
    disabled.extend(handlers.is_empty().then_some(CRI));
    let dir = dir.display();
    let settings = format!(
        "version = 2\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\ndisabled_plugins = {disabled:?}\n\
         [grpc]\naddress = \"{dir}/c.sock\"\n[ttrpc]\naddress = \"{dir}/c.sock.ttrpc\"\n"
    );
    if handlers.is_empty() {
        return settings;
    }
    let cri = format!(
        "[plugins.\"{CRI}\"]\nsandbox_image = \"{PAUSE}\"\nrestrict_oom_score_adj = true\n\
         netns_mounts_under_state_dir = true\nstream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
         [plugins.\"{CRI}\".cni]\nbin_dir = \"{dir}/cni/bin\"\nconf_dir = \"{dir}/cni/conf\"\n\
         [plugins.\"{CRI}\".containerd]\ndefault_runtime_name = \"{}\"\n",
        handlers[0]
    );
    let runtime = |handler: &&str| {
        let table = format!("plugins.\"{CRI}\".containerd.runtimes.{handler}");
        format!(
            "[{table}]\nruntime_type = \"{CAISSON}\"\n\
             pod_annotations = [\"io.caisson.*\", \"io.katacontainers.*\"]\n\
             [{table}.options]\nConfigPath = \"{dir}/{handler}.toml\"\n"
        )
    };
    [settings, cri].into_iter().chain(handlers.iter().map(runtime)).collect()
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
