//! The shim itself: one process per pod, from containerd's first call to its Shutdown.

use std::{sync::Arc, time::Duration};

use caisson_protocol::{
    containerd::shim_async::{Task, create_task},
    listen,
    sandbox_ttrpc::create_sandbox,
};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::timeout,
};
use tracing_subscriber::EnvFilter;
use ttrpc::asynchronous::Server;

use crate::{
    Error, Result, cli::Flags, events::Publisher, sandbox::Sandbox, sandbox_service::SandboxService,
    task_service::TaskService,
};

/// How long the last events may take to reach containerd.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// Serves until containerd says Shutdown, or until SIGTERM.
pub fn serve(flags: &Flags) -> Result<()> {
    start_logging(flags.debug);
    // One thread: the shim waits for others nearly all of its life.
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(Error::host("start the runtime"))?.block_on(serve_until_done(flags))
}

async fn serve_until_done(flags: &Flags) -> Result<()> {
    let listener = listen::inherited().map_err(Error::host("take the shim's socket; containerd starts it with one"))?;
    let mut terminated = signal(SignalKind::terminate()).map_err(Error::host("wait for signals"))?;
    let (publisher, sending) = Publisher::start(&flags.namespace);
    let sandbox = Sandbox::new(flags.namespace.clone(), flags.id.clone(), publisher);
    let (done, mut is_done) = watch::channel(false);

    let service: Arc<dyn Task + Send + Sync> = Arc::new(TaskService::new(sandbox.clone(), done));
    // The same service under both names: the messages are the same (containerd api/runtime/task/v2 and v3).
    let version_3 = create_task(service.clone());
    let version_2 =
        create_task(service).into_values().map(|service| ("containerd.task.v2.Task".to_owned(), service)).collect();
    let for_people = create_sandbox(Arc::new(SandboxService(sandbox.clone())));
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(version_3)
        .register_service(version_2)
        .register_service(for_people);
    server.start().await?;

    tokio::select! {
        _ = is_done.wait_for(|done| *done) => {}
        _ = terminated.recv() => sandbox.end().await,
    }
    // The answer to Shutdown is on its way: a server lets its calls end.
    let _ = server.shutdown().await;
    drop(server);
    drop(sandbox);
    let _ = timeout(LAST_EVENTS, sending).await;
    Ok(())
}

/// Lines on standard error, which `start` made containerd's log.
fn start_logging(debug: bool) {
    let level = if debug { "debug" } else { "info" };
    let filter = EnvFilter::try_from_env("CAISSON_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
}
