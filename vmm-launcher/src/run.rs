//! `run`: a VM with its console on this terminal or pipe, without containerd.

use std::{
    io::IsTerminal,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use caisson_protocol::{
    status::sentence,
    vmm::{Block, CreateRequest, Device, ExitReason, Fs, Net, VmConfig, Vsock, WaitResponse, device::Kind},
};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};

use crate::{cli::RunArgs, console::Audience, hypervisor::Hypervisor, vm::Vm};

pub(crate) async fn run<H: Hypervisor>(arguments: RunArgs) -> anyhow::Result<ExitCode> {
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let run_dir = PrivateDir::create(H::NAME)?;
    let request = request::<H>(arguments, &run_dir.0)?;

    let vm = Vm::<H>::new();
    if let Err(error) = vm.create(request, Audience::Terminal).await {
        bail!("{}", sentence(&error));
    }
    let hypervisor = vm.alive("boot")?;
    let terminal = RawTerminal::enter();
    vm.boot().await?;
    let exit = tokio::select! {
        exit = vm.wait() => exit,
        _ = terminated.recv() => stop(&vm).await,
        _ = interrupted.recv() => stop(&vm).await,
        () = hypervisor.console().escaped() => stop(&vm).await,
    };
    drop(terminal);
    match exit.reason.enum_value_or_default() {
        ExitReason::GUEST_SHUTDOWN | ExitReason::STOPPED => Ok(ExitCode::SUCCESS),
        ExitReason::GUEST_PANIC | ExitReason::HYPERVISOR_FAILED | ExitReason::EXIT_REASON_UNSPECIFIED => {
            bail!("{}", exit.detail)
        }
    }
}

async fn stop<H: Hypervisor>(vm: &Vm<H>) -> WaitResponse {
    vm.stop(Duration::ZERO).await;
    vm.wait().await
}

fn request<H: Hypervisor>(arguments: RunArgs, run_dir: &Path) -> anyhow::Result<CreateRequest> {
    let path = |path: PathBuf| -> anyhow::Result<String> {
        let path = std::path::absolute(&path).with_context(|| format!("find {}", path.display()))?;
        path.into_os_string().into_string().map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
    };
    let options = options(&arguments)?;
    let mut kinds = Vec::new();
    for disk in arguments.disk {
        kinds.push(Kind::Block(Block { path: path(disk)?, ..Default::default() }));
    }
    for (number, tap) in arguments.tap.into_iter().enumerate() {
        // Locally administered.
        kinds.push(Kind::Net(Net { tap, mac: format!("02:00:00:00:00:{:02x}", number + 1), ..Default::default() }));
    }
    for share in &arguments.share {
        let (tag, directory) =
            share.split_once('=').with_context(|| format!("--share {share} is not TAG=DIRECTORY"))?;
        kinds.push(Kind::Fs(Fs {
            tag: tag.into(),
            shared_dir: path(directory.into())?,
            daemon_path: path(arguments.virtiofsd.clone())?,
            ..Default::default()
        }));
    }
    if let Some(socket) = arguments.vsock {
        kinds.push(Kind::Vsock(Vsock { socket: path(socket)?, ..Default::default() }));
    }
    let device = |(number, kind)| Device { id: format!("dev{number}"), kind: Some(kind), ..Default::default() };
    let vm = VmConfig {
        hypervisor_path: path(arguments.hypervisor.unwrap_or_else(|| H::DEFAULT_PATH.into()))?,
        kernel: path(arguments.kernel)?,
        initrd: arguments.initrd.map(path).transpose()?.unwrap_or_default(),
        image: arguments.image.map(path).transpose()?.unwrap_or_default(),
        kernel_params: arguments.append,
        vcpus: arguments.vcpus,
        memory_mib: arguments.memory,
        devices: kinds.into_iter().enumerate().map(device).collect(),
        ..Default::default()
    };
    Ok(CreateRequest { run_dir: path(run_dir.to_owned())?, vm: Some(vm).into(), options, ..Default::default() })
}

/// `--set`, `--machine` and `--accel` as a TOML table. A value that is no TOML is a string: `--set accel=tcg`.
fn options(arguments: &RunArgs) -> anyhow::Result<String> {
    let mut table = toml::Table::new();
    for setting in &arguments.set {
        let (key, value) = setting.split_once('=').with_context(|| format!("--set {setting} is not KEY=VALUE"))?;
        let parsed = format!("value = {value}").parse::<toml::Table>().ok().and_then(|mut table| table.remove("value"));
        table.insert(key.into(), parsed.unwrap_or_else(|| value.into()));
    }
    for (key, value) in [("machine_type", &arguments.machine), ("accel", &arguments.accel)] {
        if let Some(value) = value {
            table.insert(key.into(), value.clone().into());
        }
    }
    Ok(table.to_string())
}

/// Removed when dropped.
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn create(hypervisor: &str) -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("caisson-vmm-{hypervisor}-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Standard input passes every key to the guest; as it was when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    /// None when standard input is no terminal.
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(stdin.as_fd()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}
