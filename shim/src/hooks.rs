//! OCI hooks of the runtime namespace, which is the host: `prestart`, `createRuntime`, `poststart`, `poststop`.
//!
//! The others run in the guest. A hook gets the container's state on its standard input; `pid` is the hypervisor's,
//! whose network namespace is the pod's.

use std::{process::Stdio, time::Duration};

use oci_spec::runtime::{ContainerState, Hook, Hooks, StateBuilder};
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use crate::{Error, Result};

/// For a hook that sets no limit of its own.
const DEFAULT_LIMIT: Duration = Duration::from_secs(30);

/// The hooks of one container, by the moment at which they run.
#[derive(Clone, Debug, Default)]
pub struct HostHooks {
    /// Before the container is made in the guest.
    pub before_create: Vec<Hook>,
    /// After its first process has started.
    pub after_start: Vec<Hook>,
    /// After it has been deleted.
    pub after_delete: Vec<Hook>,
}

impl HostHooks {
    /// Takes the host's part.
    pub fn of(hooks: Option<&Hooks>) -> Self {
        let Some(hooks) = hooks else { return Self::default() };
        #[allow(deprecated, reason = "still in use: nvidia-container-runtime, older nerdctl")]
        let prestart = hooks.prestart().clone();
        let create = hooks.create_runtime().clone();
        Self {
            before_create: prestart.into_iter().chain(create).flatten().collect(),
            after_start: hooks.poststart().clone().unwrap_or_default(),
            after_delete: hooks.poststop().clone().unwrap_or_default(),
        }
    }
}

/// Runs `hooks` one after the other; the first that fails ends it.
pub async fn run(hooks: &[Hook], id: &str, bundle: &str, pid: u32, status: ContainerState) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = StateBuilder::default().version("1.0.2").id(id).status(status).pid(pid as i32).bundle(bundle).build();
    let state = state.and_then(|state| Ok(serde_json::to_vec(&state)?));
    let state = state.map_err(|error| Error::Unsupported(format!("describe container {id} to its hooks: {error}")))?;
    for hook in hooks {
        run_one(hook, &state).await?;
    }
    Ok(())
}

async fn run_one(hook: &Hook, state: &[u8]) -> Result<()> {
    let path = hook.path().display().to_string();
    let failed = |why: String| Error::Boot(format!("hook {path} failed: {why}"));
    let arguments = hook.args().clone().unwrap_or_default();
    let variables = hook.env().clone().unwrap_or_default();
    let mut command = Command::new(hook.path());
    command
        // The first argument is the program's name, config.md, "POSIX-platform Hooks".
        .args(arguments.iter().skip(1))
        .env_clear()
        .envs(variables.iter().filter_map(|variable| variable.split_once('=')))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(Error::host(format!("start hook {path}")))?;
    let mut stdin = child.stdin.take();
    let work = async {
        if let Some(stdin) = stdin.as_mut() {
            // A hook need not read its state.
            let _ = stdin.write_all(state).await;
        }
        drop(stdin);
        child.wait_with_output().await
    };
    let limit =
        hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map_or(DEFAULT_LIMIT, Duration::from_secs);
    let output =
        timeout(limit, work).await.map_err(|_| failed(format!("it took longer than {} s", limit.as_secs())))?;
    let output = output.map_err(Error::host(format!("wait for hook {path}")))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(failed(format!("{}: {}", output.status, words.trim().lines().last().unwrap_or("it said nothing"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Hook {
        serde_json::from_value(serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": 5}))
            .unwrap()
    }

    #[tokio::test]
    async fn a_hook_reads_the_containers_state() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state");
        let hook = shell(&format!("/bin/cat > {}", file.display()));
        run(&[hook], "web", "/bundle", 42, ContainerState::Creating).await.unwrap();
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert_eq!(
            (state["id"].as_str(), state["pid"].as_u64(), state["status"].as_str()),
            (Some("web"), Some(42), Some("creating"))
        );
    }

    #[tokio::test]
    async fn a_failing_hook_is_named_with_its_last_words() {
        let hook = shell("echo no bridge >&2; exit 3");
        let error = run(&[hook], "web", "/bundle", 42, ContainerState::Creating).await.unwrap_err().to_string();
        assert_eq!(error, "hook /bin/sh failed: exit status: 3: no bridge");
    }

    #[tokio::test]
    async fn a_missing_hook_is_named() {
        let hook = serde_json::from_value(serde_json::json!({"path": "/nonexistent"})).unwrap();
        let error = run(&[hook], "web", "/bundle", 42, ContainerState::Creating).await.unwrap_err().to_string();
        assert_eq!(error, "start hook /nonexistent");
    }
}
