//! Makes a container's process: the maker's side. One thread, no runtime, exits when the process waits at its gate.
//!
//! libcontainer does the work. It is called below its builders, because those keep their own state on disk, and give a
//! further process of a container no seccomp filter.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::{AsRawFd, IntoRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    rc::Rc,
    sync::Mutex,
};

use libcgroups::common::CgroupConfig;
use libcontainer::{
    container::{Container, ContainerStatus},
    notify_socket::NotifyListener,
    process::{
        args::{ContainerArgs, ContainerType},
        container_main_process::container_main_process,
    },
    syscall::syscall::SyscallType,
    user_ns::UserNamespaceConfig,
};
use nix::{
    fcntl::OFlag,
    sys::{
        memfd::{MFdFlags, memfd_create},
        prctl,
    },
    unistd::{chdir, pipe2},
};
use oci_spec::runtime::Spec;
use tracing::level_filters::LevelFilter;

use crate::{
    cgroup, device_filter, home,
    launch::{Answer, Kind, Order},
    program::Program,
    spec, sys,
};

type Failure = Box<dyn std::error::Error>;

/// The whole life of a maker; `arguments` are the numbers of its two inherited sockets.
pub fn run(arguments: &[String]) {
    let [control, console] = arguments else { return };
    let inherited = |number: &str| sys::inherited(number.parse().ok()?).ok();
    let (Some(control), Some(console)) = (inherited(control), inherited(console)) else { return };
    let mut control = BufReader::new(UnixStream::from(control));
    let journal = Journal::start();
    let answer = obey(&mut control, console).unwrap_or_else(|error| Answer::Failed(journal.explain(error.as_ref())));
    let Ok(mut line) = serde_json::to_vec(&answer) else { return };
    line.push(b'\n');
    if control.get_mut().write_all(&line).is_ok() {
        // The agent watches the pid before it lets this process go, and the new one become its child.
        let _ = control.read(&mut [0]);
    }
}

fn obey(control: &mut BufReader<UnixStream>, console: OwnedFd) -> Result<Answer, Failure> {
    let mut line = String::new();
    control.read_line(&mut line)?;
    let order: Order = serde_json::from_str(&line)?;
    let config = Spec::load(order.bundle.join("config.json"))
        .map_err(|error| format!("read {}/config.json: {error}", order.bundle.display()))?;
    let console_size = config
        .process()
        .as_ref()
        .and_then(|process| process.console_size())
        .map(|size| (size.width() as u16, size.height() as u16));

    // What happens when the process fails after its gate: nobody reads it, but libcontainer writes it.
    let (_unread, failure) = pipe2(OFlag::O_CLOEXEC)?;
    let devices = config.linux().as_ref().and_then(|linux| linux.resources().as_ref()?.devices().clone());
    let (container_type, mut spec) = match &order.kind {
        Kind::Init => (ContainerType::InitContainer, spec::of_container(config)?),
        Kind::Exec { init, process } => (
            ContainerType::TenantContainer { exec_notify_fd: failure.as_raw_fd() },
            spec::of_exec(config, *init, serde_json::from_str(process)?)?,
        ),
    };
    if let Some(score) = spec.process().as_ref().and_then(|process| process.oom_score_adj()) {
        fs::write("/proc/self/oom_score_adj", score.to_string())?;
    }
    let root = spec.root().as_ref().ok_or("config.json has no root")?.path();
    let rootfs = fs::canonicalize(order.bundle.join(root))
        .map_err(|error| format!("find the root file system {}: {error}", order.bundle.join(root).display()))?;
    if let Some(mut process) = spec.process().clone() {
        let inside = match order.kind {
            Kind::Init => rootfs.clone(),
            Kind::Exec { init, .. } => format!("/proc/{init}/root").into(),
        };
        home::add(&mut process, &inside);
        spec.set_process(Some(process));
    }
    let directory = order.gate.parent().ok_or("the gate is in no directory")?;
    let container = Container::new(&order.id, ContainerStatus::Creating, None, &order.bundle, directory)?;
    chdir("/")?;
    let arguments = ContainerArgs {
        container_type,
        syscall: SyscallType::default(),
        user_ns_config: UserNamespaceConfig::new(&spec)?,
        spec: Rc::new(spec),
        rootfs,
        console_socket: order.terminal.then(|| console.into_raw_fd()),
        notify_listener: NotifyListener::new(&order.gate)?,
        preserve_fds: 0,
        container: Some(container),
        cgroup_config: CgroupConfig {
            cgroup_path: order.cgroup.clone(),
            systemd_cgroup: false,
            container_name: order.id.clone(),
        },
        detached: true,
        executor: Box::new(Program),
        no_pivot: false,
        stdin: None,
        stdout: None,
        stderr: None,
        as_sibling: false,
        pid_file: None,
    };
    if matches!(order.kind, Kind::Init)
        && let Some(rules) = devices
    {
        device_filter::apply(&Path::new(cgroup::ROOT).join(&order.cgroup), &rules)?;
    }
    // A process that joins the container's namespaces must not be open to those that are in them already.
    prctl::set_dumpable(false)?;
    let pid = container_main_process(&arguments)?;
    Ok(Answer::Made { pid: pid.as_raw(), console_size })
}

/// Keeps what libcontainer logs as errors, across its clones: the first of them tells more than the error that it
/// answers in the end.
struct Journal(Option<fs::File>);

impl Journal {
    fn start() -> Self {
        let file = memfd_create(c"journal", MFdFlags::MFD_CLOEXEC).ok().map(fs::File::from);
        if let Some(writer) = file.as_ref().and_then(|file| file.try_clone().ok()) {
            tracing_subscriber::fmt()
                .with_max_level(LevelFilter::ERROR)
                .with_ansi(false)
                .with_target(false)
                .with_level(false)
                .without_time()
                .with_writer(Mutex::new(writer))
                .init();
        }
        Self(file)
    }

    fn explain(mut self, error: &dyn std::error::Error) -> String {
        let mut text = caisson_protocol::status::sentence(error);
        let mut written = String::new();
        if let Some(file) = &mut self.0 {
            let _ = std::io::Seek::rewind(file);
            let _ = file.take(4096).read_to_string(&mut written);
        }
        if let Some(first) = written.lines().next() {
            text = format!("{text} ({})", first.trim());
        }
        text
    }
}
