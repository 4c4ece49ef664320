//! Serves the `Config` contract.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use caisson_protocol::{
    config::{
        CheckRequest, CheckResponse, Configuration, ListRequest, ListResponse, ResolveRequest, ResolveResponse,
        SandboxConfig, Setting, ShowRequest, ShowResponse, UseRequest, UseResponse, WatchEvent, WatchRequest,
    },
    config_ttrpc::{Config, create_config},
    status::{Code, Status},
};
use protobuf::MessageField;
use tokio::{
    sync::{Mutex, MutexGuard},
    task::yield_now,
};
use ttrpc::asynchronous::{Server, ServerStreamSender, TtrpcContext, transport::Listener};

use crate::{
    changes::Changes,
    check,
    configurations::{Configurations, InForce},
    idle::Connections,
    problem::Problems,
    switch,
};

/// Serves on `listener`; with `idle_timeout`, until nobody was connected for that long.
///
/// # Errors
/// When the server does not start.
pub async fn serve(
    listener: Listener,
    configurations: Configurations,
    idle_timeout: Option<Duration>,
) -> Result<(), ttrpc::Error> {
    let (listener, mut connections) = Connections::of(listener);
    let service = Arc::new(ConfigService { configurations: Mutex::new(configurations) });
    let mut server = Server::new().add_listener(listener).register_service(create_config(service));
    server.start().await?;
    match idle_timeout {
        Some(limit) => connections.idle_for(limit).await,
        None => std::future::pending().await,
    }
    Ok(())
}

/// Answers from the configurations in force.
struct ConfigService {
    /// Locked while files are read, so that requests that come together read them once.
    configurations: Mutex<Configurations>,
}

impl ConfigService {
    /// What is in force at `config_path`, and the lock to go on with.
    async fn in_force(&self, config_path: &str) -> (InForce, MutexGuard<'_, Configurations>) {
        let (arrived, requested) = (Instant::now(), requested(config_path));
        // Others that came at the same time arrive too, before one of them looks for all.
        yield_now().await;
        let mut configurations = self.configurations.lock().await;
        (configurations.in_force(requested.as_deref(), arrived).await, configurations)
    }
}

#[async_trait]
impl Config for ConfigService {
    async fn resolve(&self, _: &TtrpcContext, request: ResolveRequest) -> ttrpc::Result<ResolveResponse> {
        let (in_force, mut configurations) = self.in_force(&request.config_path).await;
        let resolved = in_force.resolved.map_err(refused)?;
        let resolved = configurations.resolver.annotate(resolved, &request.annotations).await.map_err(refused)?;
        let config = SandboxConfig { warnings: in_force.problems, ..resolved.config.clone() };
        Ok(ResolveResponse { config: MessageField::some(config), ..Default::default() })
    }

    async fn check(&self, _: &TtrpcContext, request: CheckRequest) -> ttrpc::Result<CheckResponse> {
        let (in_force, mut configurations) = self.in_force(&request.config_path).await;
        let mut problems = in_force.problems;
        if let Ok(resolved) = in_force.resolved
            && let Err(more) = configurations.resolver.annotate(resolved, &request.annotations).await
        {
            problems.extend(more.sentences());
        }
        Ok(CheckResponse { problems, ..Default::default() })
    }

    async fn show(&self, _: &TtrpcContext, request: ShowRequest) -> ttrpc::Result<ShowResponse> {
        let (in_force, mut configurations) = self.in_force(&request.config_path).await;
        let resolved = in_force.resolved.map_err(refused)?;
        let resolved = configurations.resolver.annotate(resolved, &request.annotations).await.map_err(refused)?;
        let settings = resolved.settings.iter().map(to_wire).collect();
        Ok(ShowResponse { settings, path: resolved.config.origin.clone(), ..Default::default() })
    }

    async fn list(&self, _: &TtrpcContext, _: ListRequest) -> ttrpc::Result<ListResponse> {
        let listed = switch::list(&mut self.configurations.lock().await.resolver).await;
        let configurations = listed.into_iter().map(|listed| Configuration {
            path: listed.path.display().to_string(),
            hypervisor: listed.hypervisor.unwrap_or_default(),
            in_force: listed.in_force,
            problems: listed.problems,
            ..Default::default()
        });
        Ok(ListResponse { configurations: configurations.collect(), ..Default::default() })
    }

    async fn r#use(&self, _: &TtrpcContext, request: UseRequest) -> ttrpc::Result<UseResponse> {
        let resolver = &mut self.configurations.lock().await.resolver;
        let switched = match request.configuration.as_str() {
            "" => switch::use_previous(resolver).await,
            wanted => switch::use_configuration(resolver, wanted).await,
        };
        let switched = switched.map_err(|error| Status::of(Code::FAILED_PRECONDITION, &error))?;
        let text = |path: Option<PathBuf>| path.map_or_else(String::new, |path| path.display().to_string());
        Ok(UseResponse { path: text(switched.now), previous: text(switched.before), ..Default::default() })
    }

    async fn watch(
        &self,
        _: &TtrpcContext,
        request: WatchRequest,
        watcher: ServerStreamSender<WatchEvent>,
    ) -> ttrpc::Result<()> {
        let failed = |error| Status::of(Code::RESOURCE_EXHAUSTED, &error);
        let (mut files, mut changes) = (Vec::new(), Changes::of(&[]).map_err(failed)?);
        let mut told = None;
        loop {
            let in_force = self.in_force(&request.config_path).await.0;
            if in_force.files != files {
                changes = Changes::of(&in_force.files).map_err(failed)?;
                files = in_force.files;
                // They may have changed before they were watched.
                continue;
            }
            let now = in_force.resolved.map(|resolved| resolved.config.clone()).ok();
            let now = (now, in_force.problems, in_force.last_good);
            if told.as_ref() != Some(&now) {
                watcher.send(&event(&now)).await?;
                told = Some(now);
            }
            changes.next().await.map_err(failed)?;
        }
    }
}

fn event((config, problems, last_good): &(Option<SandboxConfig>, Vec<String>, bool)) -> WatchEvent {
    let config = config.clone().unwrap_or_default();
    WatchEvent {
        path: config.origin,
        hypervisor: config.hypervisor,
        problems: problems.clone(),
        last_good: *last_good,
        ..Default::default()
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

fn refused(problems: Problems) -> Status {
    Status::of(Code::FAILED_PRECONDITION, &problems)
}
