//! The command line that containerd writes: Go's `flag` package, one dash, then an action
//! (containerd `core/runtime/v2/shim.go`).

use caisson_protocol::id::Id;

use crate::{Error, Result};

/// What this run is for.
#[derive(Debug)]
pub enum Command {
    /// Print the version.
    Version,
    /// Describe the runtime (containerd 2.x).
    Info,
    /// Make a shim for a container, or find the one of its pod.
    Start(Flags),
    /// Remove what a dead shim left.
    Delete(Flags),
    /// Be the shim: standard input is its socket.
    Serve(Flags),
}

/// Who the call is about.
#[derive(Debug)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: Id,
    /// The container.
    pub id: Id,
    /// Whether to log in detail.
    pub debug: bool,
}

/// Reads the arguments after the program's name.
pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Command> {
    let mut arguments = arguments.peekable();
    let (mut namespace, mut id, mut debug, mut action) = (String::new(), String::new(), false, String::new());
    while let Some(argument) = arguments.next() {
        let Some(flag) = argument.strip_prefix('-') else {
            action = argument;
            continue;
        };
        let (name, inline) = match flag.trim_start_matches('-').split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (flag.trim_start_matches('-').to_owned(), None),
        };
        let mut value = || {
            inline.clone().or_else(|| arguments.next()).ok_or_else(|| Error::Usage(format!("-{name} needs a value")))
        };
        match name.as_str() {
            "v" | "version" => return Ok(Command::Version),
            "info" => return Ok(Command::Info),
            "debug" => debug = inline.as_deref() != Some("false"),
            "namespace" => namespace = value()?,
            "id" => id = value()?,
            // Part of the contract; what they say also comes by the environment or the working directory.
            "address" | "publish-binary" | "bundle" | "socket" => drop(value()?),
            _ => return Err(Error::Usage(format!("unknown flag -{name}"))),
        }
    }
    let flags = Flags { namespace: Id::parse("namespace", &namespace)?, id: Id::parse("container id", &id)?, debug };
    match action.as_str() {
        "start" => Ok(Command::Start(flags)),
        "delete" => Ok(Command::Delete(flags)),
        "" => Ok(Command::Serve(flags)),
        other => Err(Error::Usage(format!("unknown action \"{other}\": start or delete"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Command> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_start_line_is_understood() {
        let line = "-namespace default -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id web -debug start";
        let Command::Start(flags) = parse_line(line).unwrap() else { panic!("not a start") };
        assert_eq!((flags.namespace.as_str(), flags.id.as_str(), flags.debug), ("default", "web", true));
    }

    #[test]
    fn no_action_serves() {
        assert!(matches!(parse_line("-namespace=k8s.io -id=pod"), Ok(Command::Serve(_))));
    }

    #[test]
    fn unknown_words_are_named() {
        let error = parse_line("-namespace a -id b restart").unwrap_err();
        assert_eq!(error.to_string(), "unknown action \"restart\": start or delete");
        assert_eq!(parse_line("-colour red").unwrap_err().to_string(), "unknown flag -colour");
    }

    #[test]
    fn an_id_that_is_a_path_is_refused() {
        assert!(parse_line("-namespace a -id ../b start").is_err());
    }
}
