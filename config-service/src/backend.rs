//! A backend's own keys, as its launcher tells them: `caisson-vmm-<hypervisor> options`.
//!
//! A launcher may list a common key too, to give it another default for its hypervisor.

use std::{collections::HashMap, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    time::timeout,
};
use toml::Value;

use crate::{
    hypervisor::{self, Hypervisor},
    installation::Installation,
    problem::{Problem, describe, quote},
    watch::{Stamp, Watch},
};

/// How long a launcher may take to tell its options.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// One key that a backend has.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct BackendOption {
    pub(crate) key: String,
    /// `bool`, `integer`, `float`, `string` or `array`; the backend alone judges anything else.
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    default: serde_json::Value,
    #[serde(default)]
    accepted: serde_json::Value,
}

impl BackendOption {
    /// `Ok`, or what is wrong with `value`.
    pub(crate) fn examine(&self, value: &Value) -> Result<(), String> {
        let fits = match self.kind.as_str() {
            "bool" => value.is_bool(),
            "integer" => value.is_integer(),
            "float" => value.is_float() || value.is_integer(),
            "string" => value.is_str() && self.has_word(value),
            "array" => value.is_array(),
            _ => true,
        };
        if fits { Ok(()) } else { Err(format!("found {}, expected {}", describe(value), self.expected())) }
    }

    /// The default as TOML has it; none where there is none.
    pub(crate) fn default(&self) -> Option<Value> {
        Value::try_from(&self.default).ok()
    }

    fn words(&self) -> Option<Vec<&str>> {
        self.accepted.as_array()?.iter().map(serde_json::Value::as_str).collect()
    }

    fn has_word(&self, value: &Value) -> bool {
        self.words().is_none_or(|words| value.as_str().is_some_and(|value| words.contains(&value)))
    }

    fn expected(&self) -> String {
        match (self.words(), &self.accepted) {
            (Some(words), _) => format!("one of \"{}\"", words.join("\", \"")),
            (None, serde_json::Value::String(accepted)) if !accepted.is_empty() => accepted.clone(),
            _ if self.kind == "bool" => "true or false".to_owned(),
            _ if self.kind.starts_with(['a', 'i']) => format!("an {}", self.kind),
            _ => format!("a {}", self.kind),
        }
    }
}

/// What launchers told, for as long as their programs stay the same.
#[derive(Debug, Default)]
pub(crate) struct Backends {
    told: HashMap<PathBuf, (Stamp, Arc<[BackendOption]>)>,
}

impl Backends {
    /// The options of `hypervisor`'s launcher.
    ///
    /// # Errors
    /// When there is no launcher, or it does not answer as it should.
    pub(crate) async fn options(
        &mut self,
        installation: &Installation,
        hypervisor: &Hypervisor,
        watch: &mut Watch,
    ) -> Result<Arc<[BackendOption]>, Problem> {
        let problem = |text| Problem::of_key(Some(&hypervisor.place), &hypervisor.key, text);
        let program = format!("caisson-vmm-{}", hypervisor.name);
        let Some((program, metadata)) = installation.find_program(&program, watch) else {
            let dirs: Vec<_> = installation.program_dirs.iter().map(|dir| dir.display().to_string()).collect();
            let suggestion = hypervisor::suggestion(&hypervisor.name);
            return Err(problem(format!("{program} is not installed: looked in {}{suggestion}", dirs.join(", "))));
        };
        let stamp = Stamp::of(&metadata);
        if let Some((then, options)) = self.told.get(&program)
            && *then == stamp
        {
            return Ok(options.clone());
        }
        let options: Arc<[_]> = ask(&program)
            .await
            .map_err(|why| problem(format!("ask {} for its options: {why}", program.display())).passing())?;
        self.told.insert(program, (stamp, options.clone()));
        Ok(options)
    }
}

async fn ask(program: &PathBuf) -> Result<Arc<[BackendOption]>, String> {
    let mut child = Command::new(program)
        .arg("options")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| error.to_string())?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let answer = async { tokio::join!(read(stdout), read(stderr), child.wait()) };
    let (stdout, stderr, status) =
        timeout(DEADLINE, answer).await.map_err(|_| format!("no answer within {} s", DEADLINE.as_secs()))?;
    let status = status.map_err(|error| error.to_string())?;
    if !status.success() {
        let words = String::from_utf8_lossy(&stderr);
        return Err(format!("{status}: {}", quote(words.trim())));
    }
    let options: Vec<_> =
        serde_json::from_slice(&stdout).map_err(|error| format!("the answer is no list of options: {error}"))?;
    Ok(options.into())
}

/// What a pipe says, as far as it fits; a pipe that breaks has said all.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        let _ = pipe.take(MAX_ANSWER).read_to_end(&mut bytes).await;
    }
    bytes
}
