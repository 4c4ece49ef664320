//! A containerd of one's own: its files, socket and mount namespace are private, and it ends with the value.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{
    BUSYBOX, Capture, Configuration, Ctr, Hypervisor, Installation, Outcome, PAUSE, Recording, Scope, daemon::Daemon,
    leftovers::Baseline,
};

/// The runtime under test, by the name that containerd knows it by.
pub const CAISSON: &str = "io.containerd.caisson.v2";
/// The runtime that it is compared with. `TESTBED_RUNTIME=io.containerd.runc.v2` runs the tests of behaviour with it, which
/// proves the tests.
pub const RUNC: &str = "io.containerd.runc.v2";

/// Where CRI keeps what is Kubernetes'.
const CRI_NAMESPACE: &str = "k8s.io";
/// The last that containerd logs before CRI answers. It also hears from then on of the images that others bring, logs
/// that, and marks them as its own, which it hears and logs again: then a pod can use them.
const CRI_SERVES: &str = "Start streaming server";
const CRI_LIMIT: Duration = Duration::from_secs(20);

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    scope: Scope,
    hypervisor: Hypervisor,
    programs: PathBuf,
    daemon: Daemon,
    baseline: Baseline,
    runtime: String,
    namespace: String,
    next_id: AtomicU32,
    /// Of the test that it was started for.
    recording: Mutex<Recording>,
}

impl Containerd {
    /// Starts one with what `cargo xtask setup` has built.
    ///
    /// # Errors
    /// When there was no set-up, or as for [`Self::start`].
    pub fn of_this_build() -> Result<Self> {
        Self::start(&Installation::find()?)
    }

    /// Starts one whose sandboxes use the hypervisor that this run is about, with the busybox images in it.
    ///
    /// # Errors
    /// When it does not come up; the error has its last words.
    pub fn start(installation: &Installation) -> Result<Self> {
        Self::start_with(installation, &Configuration::of_this_run(installation))
    }

    /// Starts one with a configuration of the test's own.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_with(installation: &Installation, configuration: &Configuration) -> Result<Self> {
        let containerd = Self::start_in(Scope::prepared()?, installation, configuration, &[])?;
        containerd.import(&installation.archives.busybox)?;
        Ok(containerd)
    }

    /// Starts one that serves Kubernetes' CRI on its socket, with a runtime handler for each of these configurations;
    /// the first is also the one in force.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_for_pods(installation: &Installation, handlers: &[(&str, &Configuration)]) -> Result<Self> {
        let scope = Scope::prepared()?;
        for (handler, configuration) in handlers {
            configuration.write(&scope.dir().join(format!("{handler}.toml")))?;
        }
        let names: Vec<_> = handlers.iter().map(|(handler, _)| *handler).collect();
        let (_, first) = handlers.first().context("there is no handler")?;
        let containerd = Self::start_in(scope, installation, first, &names)?;
        // CRI serves a little later than the rest, and says so nowhere else.
        containerd.log().wait_for(CRI_SERVES, CRI_LIMIT)?;
        containerd.import(&installation.archives.busybox)?;
        for image in [BUSYBOX, PAUSE] {
            containerd.log().wait_for(&format!("ImageUpdate event &ImageUpdate{{Name:{image},"), CRI_LIMIT)?;
        }
        Ok(containerd)
    }

    fn start_in(
        scope: Scope,
        installation: &Installation,
        configuration: &Configuration,
        handlers: &[&str],
    ) -> Result<Self> {
        let recording = Recording::begin(configuration.hypervisor().name(), configuration.hypervisor().program());
        configuration.write(&scope.dir().join("configuration.toml"))?;
        let programs = installation.programs.clone();
        let daemon = Daemon::start(&scope, &programs, handlers).or_else(|error| scope.clear().and(Err(error)))?;
        let baseline = Baseline::take(scope.clone(), daemon.pid())?;
        let runtime = env::var("TESTBED_RUNTIME").unwrap_or_else(|_| CAISSON.to_owned());
        let hypervisor = configuration.hypervisor().clone();
        let namespace = if handlers.is_empty() { scope.name() } else { CRI_NAMESPACE.to_owned() };
        let (next_id, recording) = (AtomicU32::new(1), Mutex::new(recording));
        Ok(Self { scope, hypervisor, programs, daemon, baseline, runtime, namespace, next_id, recording })
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

    /// Kills containerd and starts it again over the same state, as after a crash or an update.
    ///
    /// # Errors
    /// When it does not come up again.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon = self.daemon.replace(&self.scope, &self.programs)?;
        self.baseline.follow(self.daemon.pid())
    }

    /// `ctr <arguments>`.
    pub fn ctr(&self, arguments: &[&str]) -> Ctr {
        // Its streams and mounts are seen by containerd only from the same mount namespace.
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.daemon.pid())).args(["--mount", "--root"]);
        command.arg("ctr").arg("--address").arg(self.socket());
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
        self.namespace.clone()
    }

    /// Where it serves gRPC, CRI too.
    pub fn socket(&self) -> PathBuf {
        self.scope.dir().join("c.sock")
    }

    /// What its sandboxes use, unless a container asks for another configuration.
    pub fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }

    /// What belongs to this containerd.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// containerd's log, and so the shims' too; after a restart only what came since.
    pub fn log(&self) -> &Capture {
        self.daemon.log()
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

    /// The last thing that a test does: without it, the test is recorded as failed.
    ///
    /// # Panics
    /// When containers have left a process, a mount, a control group, a socket or a file behind: names each.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        match self.leftovers() {
            Ok(left) => {
                assert!(left.is_empty(), "left behind:\n{}\nlog:\n{}", left.join("\n"), self.daemon.log().text())
            }
            Err(error) => panic!("cannot tell what is left behind: {error:#}"),
        }
        self.recording.lock().expect("nobody panics with the recording").pass();
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.daemon.end();
        if let Err(error) = self.scope.clear() {
            eprintln!("clean up after containerd: {error:#}");
        }
    }
}
