//! The last step of a container's process: it becomes the program.

use std::{
    env,
    ffi::CString,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use libcontainer::{
    oci_spec::runtime::Spec,
    workload::{Executor, ExecutorError, ExecutorValidationError},
};
use nix::{errno::Errno, unistd::execv};

/// What a shell answers for a program that is not there, and for one that cannot be run.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;

/// Runs the program of the specification. A program that is missing shows when it is run, as it does in a shell: by
/// one line on standard error and the exit status.
#[derive(Clone)]
pub struct Program;

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let arguments = spec.process().as_ref().and_then(|process| process.args().as_ref());
        let arguments: Vec<CString> =
            arguments.into_iter().flatten().filter_map(|word| CString::new(word.as_bytes()).ok()).collect();
        let Some(name) = arguments.first() else { return Err(ExecutorError::InvalidArg) };
        let name = name.to_string_lossy().into_owned();
        let refusal = match find(&name, &env::var("PATH").unwrap_or_default()) {
            Ok(path) => {
                let _ = crate::sys::restore_sigpipe();
                run(&path, &arguments)
            }
            Err(refusal) => refusal,
        };
        // The program's own standard error: there is no other reader left.
        let line = format!("exec \"{name}\": {}\n", refusal.reason);
        let _ = std::io::stderr().write_all(line.as_bytes());
        std::process::exit(refusal.status)
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    status: i32,
    reason: String,
}

fn run(path: &Path, arguments: &[CString]) -> Refusal {
    use std::os::unix::ffi::OsStrExt;
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return Refusal { status: NOT_FOUND, reason: "not a path".into() };
    };
    let Err(error) = execv(&path, arguments);
    let status = if error == Errno::ENOENT { NOT_FOUND } else { NOT_EXECUTABLE };
    Refusal { status, reason: error.desc().to_lowercase() }
}

/// Finds the program as `execvp(3)` does: a name with a slash is a path, another is looked for in `search`.
fn find(name: &str, search: &str) -> Result<PathBuf, Refusal> {
    if name.contains('/') {
        return Ok(name.into());
    }
    let mut seen = false;
    for directory in search.split(':') {
        let path = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        let Ok(metadata) = path.metadata() else { continue };
        if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
            return Ok(path);
        }
        seen = true;
    }
    Err(if seen {
        Refusal { status: NOT_EXECUTABLE, reason: "permission denied".into() }
    } else {
        Refusal { status: NOT_FOUND, reason: "executable file not found in $PATH".into() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_for_in_the_search_path() {
        assert_eq!(find("sh", "/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn a_name_that_is_nowhere_answers_127() {
        let refusal = find("nosuch", "/bin:/usr/bin").unwrap_err();
        assert_eq!((refusal.status, refusal.reason.as_str()), (127, "executable file not found in $PATH"));
    }

    #[test]
    fn a_file_that_may_not_be_run_answers_126() {
        assert_eq!(find("passwd", "/etc").unwrap_err().status, 126);
    }

    #[test]
    fn a_path_is_taken_as_it_is() {
        assert_eq!(find("./run", "/bin").unwrap(), Path::new("./run"));
    }
}
