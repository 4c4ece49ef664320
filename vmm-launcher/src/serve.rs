//! `serve`: the contract on the listening socket that is standard input, until the parent or a signal ends it.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use caisson_protocol::{listen, vmm_ttrpc};
use nix::sys::{
    prctl::set_pdeathsig,
    signal::{SigSet, Signal},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tracing::info;
use ttrpc::asynchronous::Server;

use crate::{hypervisor::Hypervisor, service::Service, vm::Vm};

/// How long the VM may take to end by force; less than the shim waits for this program.
const END_LIMIT: Duration = Duration::from_secs(4);

pub(crate) async fn serve<H: Hypervisor>() -> anyhow::Result<()> {
    // A parent that blocks them passes that on.
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]).thread_unblock().context("take signals")?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    // Whoever started this program owns the VM.
    set_pdeathsig(Signal::SIGTERM).context("ask for a signal at the parent's death")?;

    let listener = listen::inherited().context("use standard input as the socket to serve on")?;
    let vm = Vm::<H>::new();
    let service: Arc<dyn vmm_ttrpc::Vmm + Send + Sync> = Arc::new(Service { vm: vm.clone() });
    let mut server = Server::new().add_listener(listener).register_service(vmm_ttrpc::create_vmm(service));
    server.start().await.context("serve the Vmm contract")?;
    tokio::select! {
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    info!("told to end");
    // Should the VM not end in time, the kernel kills it when this process ends, or whoever has named its state_dir.
    timeout(END_LIMIT, vm.stop(Duration::ZERO)).await.context("end the VM in time")
}
