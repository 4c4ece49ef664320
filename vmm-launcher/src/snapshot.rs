//! What a VM has to be, and where, to be saved, whatever saves it.

use std::{fs, path::Path};

use caisson_protocol::vmm::VmState;

use crate::{Error, Result};

/// Checks that a VM which is `state` can be saved to `directory`.
///
/// # Errors
/// When it is not paused; when the directory is not one that is there, empty.
pub fn check(state: VmState, directory: &str) -> Result<()> {
    let state = match state {
        VmState::PAUSED => return check_directory(directory),
        VmState::RUNNING => "running",
        _ => "created but not booted",
    };
    Err(Error::WrongState { verb: "snapshot", state })
}

fn check_directory(directory: &str) -> Result<()> {
    let path = Path::new(directory);
    if !path.is_absolute() {
        let directory = directory.escape_debug();
        return Err(Error::Invalid(format!("the snapshot's directory \"{directory}\" is not an absolute path")));
    }
    let refused = |source| Error::File { what: "snapshot's directory", path: path.to_owned(), source };
    if fs::read_dir(path).map_err(refused)?.next().is_some() {
        return Err(Error::Invalid(format!("the snapshot's directory {directory} is not empty")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(state: VmState, directory: &Path) -> String {
        check(state, directory.to_str().unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn a_paused_vm_is_saved_to_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check(VmState::PAUSED, dir.path().to_str().unwrap()).is_ok());
    }

    #[test]
    fn only_a_paused_vm_is_saved() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(refusal(VmState::RUNNING, dir.path()), "cannot snapshot a VM that is running");
        assert_eq!(refusal(VmState::CREATED, dir.path()), "cannot snapshot a VM that is created but not booted");
    }

    #[test]
    fn the_directory_is_named_that_cannot_be_used() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("state"), "").unwrap();
        assert!(refusal(VmState::PAUSED, dir.path()).ends_with(" is not empty"));
        assert!(refusal(VmState::PAUSED, Path::new("here")).ends_with("\"here\" is not an absolute path"));
        let missing = refusal(VmState::PAUSED, Path::new("/nonexistent/snapshot"));
        assert_eq!(missing, "open the snapshot's directory /nonexistent/snapshot");
    }
}
