//! What people read about a key, whoever knows it: the tables here, or a launcher.

use toml::Value;

use crate::{
    keys::{AGENT, HYPERVISOR, Key, RUNTIME, Takes, valid_paths},
    launchers::LauncherOption,
};

/// One key, for a file or a page.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KeyDoc {
    pub(crate) name: String,
    pub(crate) meaning: String,
    pub(crate) accepts: String,
    pub(crate) default: Value,
}

/// Of `[hypervisor.<name>]`, whichever it is, with the defaults that a launcher with these `options` gives them.
pub(crate) fn common(options: &[LauncherOption]) -> Vec<KeyDoc> {
    let default = |name| options.iter().find(|option| option.key == name).and_then(LauncherOption::default);
    let doc = |key: &Key| {
        let doc = of(key);
        KeyDoc { default: default(key.name).unwrap_or(doc.default), ..doc }
    };
    HYPERVISOR.iter().map(doc).collect()
}

/// The launcher's own.
pub(crate) fn own(options: &[LauncherOption]) -> Vec<KeyDoc> {
    let is_common = |option: &&LauncherOption| HYPERVISOR.iter().any(|key| key.name == option.key);
    let mut docs = Vec::new();
    for option in options.iter().filter(|option| !is_common(option)) {
        docs.push(KeyDoc {
            name: option.key.clone(),
            meaning: option.doc.clone(),
            accepts: option.accepts(),
            default: option.default().unwrap_or_else(|| "".into()),
        });
        if option.is_path() {
            docs.push(KeyDoc {
                name: valid_paths(&option.key),
                meaning: format!("What an annotation may give {}.", option.key),
                accepts: Takes::Globs.to_string(),
                default: Value::Array(Vec::new()),
            });
        }
    }
    docs
}

/// Of `[agent]`.
pub(crate) fn agent() -> Vec<KeyDoc> {
    AGENT.iter().map(of).collect()
}

/// Of `[runtime]`.
pub(crate) fn runtime() -> Vec<KeyDoc> {
    RUNTIME.iter().map(of).collect()
}

fn of(key: &Key) -> KeyDoc {
    KeyDoc {
        name: key.name.to_owned(),
        meaning: key.meaning.to_owned(),
        accepts: key.takes.to_string(),
        default: key.default(),
    }
}
