//! From a request to a configuration, in one pass over the files.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use caisson_protocol::config::SandboxConfig;

use crate::{
    annotations::{self, Wish},
    check::{self, Checked, NamedFile, Refused, Setting},
    document::Table,
    files::{self, Wanted},
    hypervisor::{self, Hypervisor},
    installation::{Found, Installation},
    launchers::{self, Ability, Capabilities, Launchers, Silence},
    load::{self, Layer},
    problem::{Problem, Problems},
    rules::{self, Beyond},
    sizing,
    watch::Watch,
};

/// What serves shared directories.
const DAEMON: &str = "virtiofsd";

/// A configuration without problems.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// What the shim gets.
    pub config: SandboxConfig,
    /// Every value of it, and where it comes from.
    pub settings: Vec<Setting>,
    file: PathBuf,
    document: Table,
    /// Which it names.
    files: Vec<PathBuf>,
}

impl Resolved {
    /// Whether the files that it names still exist.
    pub(crate) fn files_are_there(&self) -> bool {
        self.files.iter().all(|file| file.exists())
    }
}

/// Resolves requests against the files of one installation. Remembers only what launchers told of themselves.
#[derive(Debug)]
pub struct Resolver {
    installation: Installation,
    launchers: Launchers,
}

impl Resolver {
    /// For `installation`.
    pub fn new(installation: Installation) -> Self {
        Self { installation, launchers: Launchers::default() }
    }

    /// Where it looks.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// Resolves `requested`, or the configuration that the lookup order finds.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub async fn resolve(&mut self, requested: Option<&Path>) -> Result<Resolved, Problems> {
        let found = self.installation.find(requested, &mut Watch::new())?;
        self.resolve_found(&found).await
    }

    /// Resolves `requested` for a container with these `annotations`.
    ///
    /// # Errors
    /// Everything that is wrong with the configuration, or else with the annotations.
    pub async fn resolve_for(
        &mut self,
        requested: Option<&Path>,
        annotations: &HashMap<String, String>,
    ) -> Result<Resolved, Problems> {
        let resolved = Arc::new(self.resolve(requested).await?);
        self.annotate(resolved, annotations).await.map(Arc::unwrap_or_clone)
    }

    pub(crate) async fn resolve_found(&mut self, found: &Found) -> Result<Resolved, Problems> {
        let mut watch = Watch::new();
        let layers = load::read(found, &mut watch).map_err(|problems| Problems::of(Some(&found.file), problems))?;
        self.resolve_layers(&found.file, &layers, &mut watch).await
    }

    /// What the configuration comes to as far as nothing is wrong with it, and what is, a sentence each.
    pub(crate) async fn examine_found(&mut self, found: &Found) -> (SandboxConfig, Vec<String>) {
        let mut watch = Watch::new();
        let document = load::read(found, &mut watch).and_then(|layers| load::merge(&layers));
        let (config, problems) = match document {
            Ok(document) => {
                let checked = self.examine(&document, &mut watch).await;
                (checked.config, checked.problems)
            }
            Err(problems) => (SandboxConfig::default(), problems),
        };
        (config, Problems::of(Some(&found.file), problems).sentences())
    }

    /// What the `layers` of the configuration `file` come to.
    pub(crate) async fn resolve_layers(
        &mut self,
        file: &Path,
        layers: &[Layer],
        watch: &mut Watch,
    ) -> Result<Resolved, Problems> {
        let document = load::merge(layers).map_err(|found| Problems::of(Some(file), found))?;
        self.judge(file, document, watch).await
    }

    /// What `resolved` comes to for a container with these `annotations`.
    pub(crate) async fn annotate(
        &mut self,
        mut resolved: Arc<Resolved>,
        annotations: &HashMap<String, String>,
    ) -> Result<Arc<Resolved>, Problems> {
        let problems = |found| Problems::of(None, found);
        let wishes = annotations::wishes(annotations).map_err(problems)?;
        if !wishes.is_empty() {
            let document = self.lay_over(&resolved, &wishes).await?;
            let judged = self.judge(&resolved.file, document, &mut Watch::new()).await;
            resolved = Arc::new(judged.map_err(Problems::of_pod)?);
        }
        let mut vm = resolved.config.vm.clone().unwrap_or_default();
        sizing::size(&mut vm, annotations).map_err(problems)?;
        if resolved.config.vm.as_ref() != Some(&vm) {
            Arc::make_mut(&mut resolved).config.vm = Some(vm).into();
        }
        Ok(resolved)
    }

    /// The annotations that choose the hypervisor come first, since its table says what else is allowed.
    async fn lay_over(&mut self, resolved: &Resolved, wishes: &[Wish]) -> Result<Table, Problems> {
        let mut document = resolved.document.clone();
        let (of_hypervisor, others): (Vec<_>, Vec<_>) = wishes.iter().partition(|wish| wish.section == "hypervisor");
        let chosen = &resolved.config.hypervisor;
        let mut problems = annotations::lay_over(&mut document, chosen, &[], others.into_iter());
        let chosen = hypervisor::choose(&document)?;
        let options = self.launchers.options(&self.installation, &chosen.name, &mut Watch::new()).await;
        let options = options.map_err(|silence| self.silent(&chosen, silence))?;
        problems.extend(annotations::lay_over(&mut document, &chosen.name, &options, of_hypervisor.into_iter()));
        if problems.is_empty() { Ok(document) } else { Err(Problems::of(None, problems)) }
    }

    async fn judge(&mut self, file: &Path, document: Table, watch: &mut Watch) -> Result<Resolved, Problems> {
        let checked = self.examine(&document, watch).await;
        if !checked.problems.is_empty() {
            return Err(Problems::of(Some(file), checked.problems));
        }
        let config = SandboxConfig { origin: file.display().to_string(), ..checked.config };
        let files = checked.files.into_iter().map(|file| file.path).collect();
        Ok(Resolved { config, settings: checked.settings, file: file.to_owned(), document, files })
    }

    /// Checks `document` for the hypervisor that it chooses, with all that its launcher and this host tell.
    async fn examine(&mut self, document: &Table, watch: &mut Watch) -> Checked {
        let mut problems = Vec::new();
        let chosen = hypervisor::choose(document).map_err(|problem| problems.push(problem)).ok();
        let options = match &chosen {
            Some(chosen) => {
                let options = self.launchers.options(&self.installation, &chosen.name, watch).await;
                options.map_err(|silence| problems.push(self.silent(chosen, silence))).ok()
            }
            None => None,
        };
        let name = chosen.as_ref().map(|chosen| chosen.name.as_str());
        let mut checked = check::check(document, name, options.as_deref());
        let no_daemon = self.find_daemon(&mut checked, watch);
        self.name_others_that_take(&mut checked, watch).await;
        checked.problems.append(&mut problems);
        checked.problems.extend(no_daemon);
        let capabilities = match &chosen {
            Some(chosen) if options.is_some() => {
                let told = self.capabilities(chosen, &checked.config, watch).await;
                told.map_err(|problem| checked.problems.push(problem)).ok().flatten()
            }
            _ => None,
        };
        rules::examine(&mut checked, options.as_deref(), watch);
        let beyond = capabilities.map(|capabilities| rules::beyond(&checked, &capabilities)).unwrap_or_default();
        for Beyond { mut problem, ability } in beyond {
            if let Some(ability) = ability {
                problem.add_choices(&self.able(ability, name.unwrap_or_default(), watch).await);
            }
            checked.problems.push(problem);
        }
        checked.problems.extend(self.check_unused(document, name.unwrap_or_default(), watch).await);
        checked
    }

    /// Has the configuration name the virtiofsd that is found where it names none, or tells that there is none.
    fn find_daemon(&self, checked: &mut Checked, watch: &mut Watch) -> Option<Problem> {
        let shared_fs = checked.config.shared_fs.as_mut().filter(|shared_fs| shared_fs.daemon_path.is_empty())?;
        let key = format!("hypervisor.{}.virtio_fs_daemon", checked.config.hypervisor);
        let at = checked.settings.iter().position(|setting| setting.key == key)?;
        let setting = &mut checked.settings[at];
        let Some((path, _)) = self.installation.find_program(DAEMON, watch) else {
            let looked = self.program_dirs();
            let text = format!("there is no {DAEMON} in {looked}; install it, or set this to where it is");
            return Some(Problem::of_key(setting.origin.as_ref(), key, text));
        };
        shared_fs.daemon_path = path.display().to_string();
        setting.value = shared_fs.daemon_path.clone().into();
        checked.files.push(NamedFile { setting: at, path, wanted: Wanted::Program });
        None
    }

    /// For messages.
    fn program_dirs(&self) -> String {
        let dirs = self.installation.program_dirs.iter().map(|dir| dir.display().to_string());
        dirs.collect::<Vec<_>>().join(", ")
    }

    /// What the hypervisor can do; nothing when its program is missing, which is told elsewhere.
    async fn capabilities(
        &mut self,
        chosen: &Hypervisor,
        config: &SandboxConfig,
        watch: &mut Watch,
    ) -> Result<Option<Arc<Capabilities>>, Problem> {
        let path = config.vm.hypervisor_path.as_str();
        if !path.is_empty() && files::examine(Path::new(path), Wanted::Program).is_err() {
            return Ok(None);
        }
        let told = self.launchers.capabilities(&self.installation, &chosen.name, (path, &config.options), watch).await;
        told.map(Some).map_err(|silence| self.silent(chosen, silence))
    }

    async fn name_others_that_take(&mut self, checked: &mut Checked, watch: &mut Watch) {
        for Refused { problem, key, value } in std::mem::take(&mut checked.refused) {
            let mut takers = Vec::new();
            for known in hypervisor::KNOWN {
                let told = self.launchers.options(&self.installation, known.name, watch).await;
                let options = told.unwrap_or_default();
                if options.iter().any(|option| option.key == key && option.examine(&value).is_ok()) {
                    takers.push(known.name);
                }
            }
            if let Some(problem) = checked.problems.get_mut(problem) {
                problem.add_choices(&takers);
            }
        }
    }

    /// The other hypervisors that are installed here and can do it.
    async fn able(&mut self, ability: Ability, chosen: &str, watch: &mut Watch) -> Vec<&'static str> {
        let mut able = Vec::new();
        for other in hypervisor::KNOWN.iter().filter(|known| known.name != chosen) {
            let told = self.launchers.capabilities(&self.installation, other.name, ("", ""), watch).await;
            if told.is_ok_and(|told| told.has(ability)) {
                able.push(other.name);
            }
        }
        able
    }

    /// The tables of hypervisors that may be chosen later. Their files may come later, too.
    async fn check_unused(&mut self, document: &Table, chosen: &str, watch: &mut Watch) -> Vec<Problem> {
        let mut problems = Vec::new();
        for other in hypervisor::others(document, chosen) {
            let options = match self.launchers.options(&self.installation, &other.name, watch).await {
                Ok(options) => Some(options),
                Err(Silence::NotInstalled) if !hypervisor::is_known(&other.name) => {
                    problems.push(self.silent(&other, Silence::NotInstalled));
                    None
                }
                Err(_) => None,
            };
            problems.extend(check::check_unused(document, &other.name, options.as_deref()));
        }
        problems
    }

    fn silent(&self, hypervisor: &Hypervisor, silence: Silence) -> Problem {
        let problem = |text| Problem::of_key(Some(&hypervisor.place), &hypervisor.key, text);
        match silence {
            Silence::NotInstalled => {
                let known = hypervisor::is_known(&hypervisor.name);
                let suggestion = if known { String::new() } else { hypervisor::suggestion(&hypervisor.name) };
                let program = launchers::program(&hypervisor.name);
                problem(format!("{program} is not installed: looked in {}{suggestion}", self.program_dirs()))
            }
            // It may have been busy.
            Silence::Failed(why) => problem(why).passing(),
        }
    }
}

/// Everything that is wrong with a configuration's text by itself, and with annotations laid over it: no file is looked
/// for, and no launcher asked.
pub fn problems_in(text: &str, annotations: &HashMap<String, String>) -> Vec<String> {
    let layer = Layer { file: "configuration.toml".into(), text: text.to_owned() };
    let found = load::merge(&[layer]).and_then(|mut document| {
        let wishes = annotations::wishes(annotations)?;
        let chosen = hypervisor::choose(&document).map_err(|problem| vec![problem])?.name;
        let refused = annotations::lay_over(&mut document, &chosen, &[], wishes.iter());
        let mut checked = check::check(&document, Some(&chosen), Some(&[]));
        checked.problems.extend(refused);
        for other in hypervisor::others(&document, &chosen) {
            checked.problems.extend(check::check_unused(&document, &other.name, Some(&[])));
        }
        let sized = sizing::size(checked.config.vm.mut_or_insert_default(), annotations);
        checked.problems.extend(sized.err().into_iter().flatten());
        if checked.problems.is_empty() { Ok(()) } else { Err(checked.problems) }
    });
    found.err().map(|problems| Problems::of(None, problems).sentences()).unwrap_or_default()
}
