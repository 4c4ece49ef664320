//! Serves the `Config` contract.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use caisson_protocol::{
    config::{
        CheckRequest, CheckResponse, ResolveRequest, ResolveResponse, SandboxConfig, Setting, ShowRequest, ShowResponse,
    },
    config_ttrpc::{Config, create_config},
    status::{Code, Status},
};
use protobuf::MessageField;
use tokio::sync::Mutex;
use ttrpc::asynchronous::{Server, TtrpcContext, transport::Listener};

use crate::{
    check, configurations::Configurations, idle::Connections, installation::Installation, problem::Problems,
    resolve::Resolver,
};

/// Serves on `listener`; with `idle_timeout`, until nobody was connected for that long. A configuration that only
/// this process still knows keeps it running.
///
/// # Errors
/// When the server does not start.
pub async fn serve(
    listener: Listener,
    installation: Installation,
    idle_timeout: Option<Duration>,
) -> Result<(), ttrpc::Error> {
    let (listener, mut connections) = Connections::of(listener);
    let service = Arc::new(ConfigService::new(installation));
    let mut server = Server::new().add_listener(listener).register_service(create_config(service.clone()));
    server.start().await?;
    let Some(idle_timeout) = idle_timeout else { return std::future::pending().await };
    loop {
        connections.idle_for(idle_timeout).await;
        if !service.configurations.lock().await.keeps_a_last_good() {
            return Ok(());
        }
    }
}

/// Answers from the configurations in force.
struct ConfigService {
    /// Locked while files are read, so that requests that come together read them once.
    configurations: Mutex<Configurations>,
}

impl ConfigService {
    fn new(installation: Installation) -> Self {
        Self { configurations: Mutex::new(Configurations::new(Resolver::new(installation))) }
    }
}

#[async_trait]
impl Config for ConfigService {
    async fn resolve(&self, _: &TtrpcContext, request: ResolveRequest) -> ttrpc::Result<ResolveResponse> {
        let arrived = Instant::now();
        let requested = requested(&request.config_path);
        let mut configurations = self.configurations.lock().await;
        let in_force = configurations.in_force(requested.as_deref(), arrived).await.map_err(status)?;
        // The same look at the files: nothing is read again.
        let warnings = configurations.problems(requested.as_deref(), arrived).await;
        let config = MessageField::some(SandboxConfig { warnings, ..in_force.config.clone() });
        Ok(ResolveResponse { config, ..Default::default() })
    }

    async fn check(&self, _: &TtrpcContext, request: CheckRequest) -> ttrpc::Result<CheckResponse> {
        let arrived = Instant::now();
        let requested = requested(&request.config_path);
        let problems = self.configurations.lock().await.problems(requested.as_deref(), arrived).await;
        Ok(CheckResponse { problems, ..Default::default() })
    }

    async fn show(&self, _: &TtrpcContext, request: ShowRequest) -> ttrpc::Result<ShowResponse> {
        let arrived = Instant::now();
        let requested = requested(&request.config_path);
        let in_force = self.configurations.lock().await.in_force(requested.as_deref(), arrived).await;
        let settings = in_force.map_err(status)?.settings.iter().map(to_wire).collect();
        Ok(ShowResponse { settings, ..Default::default() })
    }
}

fn to_wire(setting: &check::Setting) -> Setting {
    Setting {
        key: setting.key.clone(),
        value: setting.value.to_string(),
        origin: setting.origin(),
        ..Default::default()
    }
}

fn requested(config_path: &str) -> Option<PathBuf> {
    (!config_path.is_empty()).then(|| Path::new(config_path).to_owned())
}

fn status(problems: Problems) -> Status {
    Status::of(Code::FAILED_PRECONDITION, &problems)
}
