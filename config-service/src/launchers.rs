//! What launchers tell of themselves: `caisson-vmm-<hypervisor> options` and `… capabilities --json`.
//!
//! A launcher may list a common key too, to give it another default for its hypervisor.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    time::timeout,
};
use toml::Value;

use crate::{
    installation::Installation,
    keys,
    problem::{describe, nearest, quote_reason},
    watch::{Stamp, Watch},
};

/// How long a launcher may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1 << 20;
/// How many answers are remembered; a host has a handful.
const MAX_REMEMBERED: usize = 64;

/// One key that a launcher knows.
#[derive(Clone, Debug, Deserialize)]
pub struct LauncherOption {
    /// As it is written.
    pub key: String,
    /// `bool`, `integer`, `float`, `string`, `array`, `file` or `program`; the launcher alone judges anything else.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// What holds when it is not written.
    #[serde(default)]
    default: serde_json::Value,
    /// Words to choose from, or a sentence.
    #[serde(default)]
    accepted: serde_json::Value,
    /// Of an integer.
    #[serde(default)]
    minimum: Option<i64>,
    /// Of an integer.
    #[serde(default)]
    maximum: Option<i64>,
    /// By a value of this key: which values other keys of the launcher have to have with it.
    #[serde(default)]
    needs: BTreeMap<String, BTreeMap<String, Value>>,
    /// One sentence for people.
    #[serde(default)]
    pub doc: String,
}

impl LauncherOption {
    /// `Ok`, or what is wrong with `value`.
    pub(crate) fn examine(&self, value: &Value) -> Result<(), String> {
        let fits = match self.kind.as_str() {
            "bool" => value.is_bool(),
            "integer" => value.as_integer().is_some_and(|number| self.is_within(number)),
            "float" => value.is_float() || value.is_integer(),
            "string" | "file" | "program" => value.is_str() && self.has_word(value),
            "array" => value.is_array(),
            _ => true,
        };
        if fits {
            return Ok(());
        }
        let near = match (self.words(), value) {
            (Some(words), Value::String(word)) => nearest(word, &words),
            _ => String::new(),
        };
        Err(format!("found {}, expected {}{near}", describe(value), self.accepts()))
    }

    /// The default as TOML has it; none where there is none.
    pub fn default(&self) -> Option<Value> {
        Value::try_from(&self.default).ok()
    }

    /// What may be written, as the end of a sentence.
    pub fn accepts(&self) -> String {
        match (self.words(), &self.accepted) {
            (Some(words), _) => keys::one_of(&words),
            (None, serde_json::Value::String(accepted)) if !accepted.is_empty() => accepted.clone(),
            _ => match (self.kind.as_str(), self.minimum, self.maximum) {
                ("integer", Some(least), Some(most)) => format!("a whole number from {least} to {most}"),
                ("integer", ..) => "a whole number".to_owned(),
                ("bool", ..) => "true or false".to_owned(),
                ("array", ..) => "an array".to_owned(),
                ("file" | "program", ..) => format!("the absolute path of a {}", self.kind),
                ("float", ..) => "a number".to_owned(),
                _ => "a string".to_owned(),
            },
        }
    }

    /// Which keys have to have which values when this one has `value`.
    pub(crate) fn needs(&self, value: &Value) -> impl Iterator<Item = (&str, &Value)> {
        let needs = value.as_str().and_then(|value| self.needs.get(value));
        needs.into_iter().flatten().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether it names a file of the host.
    pub(crate) fn is_path(&self) -> bool {
        matches!(self.kind.as_str(), "file" | "program")
    }

    fn words(&self) -> Option<Vec<&str>> {
        self.accepted.as_array()?.iter().map(serde_json::Value::as_str).collect()
    }

    fn has_word(&self, value: &Value) -> bool {
        self.words().is_none_or(|words| value.as_str().is_some_and(|value| words.contains(&value)))
    }

    fn is_within(&self, number: i64) -> bool {
        self.minimum.is_none_or(|least| number >= least) && self.maximum.is_none_or(|most| number <= most)
    }
}

/// What an installed hypervisor can do.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Capabilities {
    /// As the hypervisor itself says it.
    #[serde(default)]
    pub(crate) version: String,
    #[serde(default)]
    devices: Vec<String>,
    /// How guest code runs; empty when it does not.
    #[serde(default)]
    pub(crate) accelerator: String,
    #[serde(default)]
    accelerator_reason: String,
    #[serde(default)]
    operations: Vec<String>,
    #[serde(default)]
    features: Vec<String>,
    #[serde(default)]
    confidential: Vec<String>,
    /// Why something cannot be done.
    #[serde(default)]
    missing: BTreeMap<String, String>,
}

impl Capabilities {
    /// Whether it can do this.
    pub(crate) fn has(&self, ability: Ability) -> bool {
        let told = || self.devices.iter().chain(&self.operations).chain(&self.features);
        match ability {
            Ability::Named(name) => told().any(|known| known == name),
            Ability::Confidential => !self.confidential.is_empty(),
        }
    }

    /// Why it cannot; none when the launcher does not tell.
    pub(crate) fn reason(&self, ability: Ability) -> Option<String> {
        match ability {
            Ability::Named(name) => self.missing.get(name).cloned(),
            Ability::Confidential => {
                let of = |kind: &&str| self.missing.get(*kind).map(|why| format!("{kind}: {why}"));
                let reasons: Vec<_> = CONFIDENTIAL.iter().filter_map(of).collect();
                (!reasons.is_empty()).then(|| reasons.join("; "))
            }
        }
    }

    /// The kinds of confidential guests that it starts.
    pub(crate) fn confidential(&self) -> &[String] {
        &self.confidential
    }
}

/// Something that one hypervisor can do and another cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ability {
    /// A kind of device, an operation or a feature, as `vmm.proto` names it.
    Named(&'static str),
    /// Any kind of confidential guest.
    Confidential,
}

/// The kinds of confidential guests, as `vmm.proto` names them.
const CONFIDENTIAL: [&str; 2] = ["tdx", "sev-snp"];

/// Why a launcher told nothing.
#[derive(Debug)]
pub(crate) enum Silence {
    /// There is none.
    NotInstalled,
    /// There is one, which does not answer as it should.
    Failed(String),
}

/// What launchers told, for as long as the programs stay the same.
#[derive(Debug, Default)]
pub(crate) struct Launchers {
    options: HashMap<PathBuf, Told<[LauncherOption]>>,
    /// By the launcher, the hypervisor's program and the options.
    capabilities: HashMap<(PathBuf, String, String), Told<Capabilities>>,
}

#[derive(Debug)]
struct Told<T: ?Sized> {
    /// Of the launcher, and of the hypervisor's program if that matters.
    stamps: [Option<Stamp>; 2],
    answer: Arc<T>,
}

impl Launchers {
    /// The options of `hypervisor`'s launcher.
    pub(crate) async fn options(
        &mut self,
        installation: &Installation,
        hypervisor: &str,
        watch: &mut Watch,
    ) -> Result<Arc<[LauncherOption]>, Silence> {
        let Some((program, metadata)) = installation.find_program(&program(hypervisor), watch) else {
            return Err(Silence::NotInstalled);
        };
        let stamps = [Some(Stamp::of(&metadata)), None];
        if let Some(told) = self.options.get(&program).filter(|told| told.stamps == stamps) {
            return Ok(told.answer.clone());
        }
        let options: Vec<LauncherOption> = ask(&program, &["options"])
            .await
            .map_err(|why| Silence::Failed(format!("ask {} for its options: {why}", program.display())))?;
        let answer: Arc<[_]> = options.into();
        self.options.insert(program, Told { stamps, answer: answer.clone() });
        Ok(answer)
    }

    /// What the hypervisor's program at `path` can do with the launcher's own `options`, a TOML table; "" is the launcher's
    /// choice.
    pub(crate) async fn capabilities(
        &mut self,
        installation: &Installation,
        hypervisor: &str,
        (path, options): (&str, &str),
        watch: &mut Watch,
    ) -> Result<Arc<Capabilities>, Silence> {
        let Some((program, metadata)) = installation.find_program(&program(hypervisor), watch) else {
            return Err(Silence::NotInstalled);
        };
        let theirs = if path.is_empty() { None } else { watch.look(Path::new(path)) };
        let stamps = [Some(Stamp::of(&metadata)), theirs.as_ref().map(Stamp::of)];
        let key = (program, path.to_owned(), options.to_owned());
        if let Some(told) = self.capabilities.get(&key).filter(|told| told.stamps == stamps) {
            return Ok(told.answer.clone());
        }
        let answer = ask(&key.0, &["capabilities", "--json", "--hypervisor", path, "--options", options]).await;
        let answer = answer.map_err(|why| Silence::Failed(format!("ask {} what it can do: {why}", key.0.display())));
        let answer: Arc<Capabilities> = Arc::new(answer?);
        if answer.accelerator.is_empty() && !answer.accelerator_reason.is_empty() {
            return Err(Silence::Failed(format!("cannot run here: {}", answer.accelerator_reason)));
        }
        if self.capabilities.len() >= MAX_REMEMBERED {
            self.capabilities.clear();
        }
        self.capabilities.insert(key, Told { stamps, answer: Arc::clone(&answer) });
        Ok(answer)
    }
}

/// The name of `hypervisor`'s launcher.
pub(crate) fn program(hypervisor: &str) -> String {
    format!("caisson-vmm-{hypervisor}")
}

async fn ask<T: DeserializeOwned>(program: &Path, question: &[&str]) -> Result<T, String> {
    let mut child = Command::new(program)
        .args(question)
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
        return Err(format!("{status}: {}", quote_reason(&words)));
    }
    serde_json::from_slice(&stdout).map_err(|error| format!("the answer is not what was asked for: {error}"))
}

/// What a pipe says, as far as it fits; a pipe that breaks has said all.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        let _ = pipe.take(MAX_ANSWER).read_to_end(&mut bytes).await;
    }
    bytes
}
