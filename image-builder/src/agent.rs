//! Finds the guest agent, and makes sure that it can be a guest's first process.

use std::fs;
use std::path::{Path, PathBuf};

use object::elf::{EM_X86_64, FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};

use crate::digest;
use crate::error::{Error, Result};

/// File name of the agent.
const NAME: &str = "caisson-agent";

/// Where cargo leaves it, from the workspace's root.
const IN_WORKSPACE: &str = "target/x86_64-unknown-linux-gnu/guest/caisson-agent";

/// The agent: a static program.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Where it is.
    pub path: PathBuf,
    /// Digest of the program.
    pub sha256: String,
}

impl Agent {
    /// The given agent, or the one in the workspace around the current directory, or the one beside this program, which
    /// may be one that was built for tests.
    pub fn find(given: Option<&Path>) -> Result<Self> {
        if let Some(path) = given {
            return Self::open(path);
        }
        let candidates = candidates();
        match candidates.iter().find(|path| path.is_file()) {
            Some(path) => Self::open(path),
            None => {
                let looked_at = candidates.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
                Err(Error::NoAgent { looked_at })
            }
        }
    }

    fn open(path: &Path) -> Result<Self> {
        let program = fs::read(path).map_err(Error::file("read", path))?;
        check_static(path, &program)?;
        Ok(Self { path: path.to_owned(), sha256: digest::of_bytes(&program) })
    }
}

fn candidates() -> Vec<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join(NAME)));
    let here = std::env::current_dir().unwrap_or_default();
    let workspace = here.ancestors().find(|directory| directory.join("Cargo.lock").is_file());
    workspace.map(|root| root.join(IN_WORKSPACE)).into_iter().chain(beside).collect()
}

/// Refuses what is no x86-64 program, and what needs a dynamic linker.
fn check_static(path: &Path, program: &[u8]) -> Result<()> {
    let malformed = |reason: &str| Error::malformed(format!("the agent {}", path.display()), reason);
    let header =
        FileHeader64::<object::Endianness>::parse(program).map_err(|_| malformed("it is not a 64-bit ELF program"))?;
    let endian = header.endian().map_err(|_| malformed("it is not a 64-bit ELF program"))?;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(malformed("it is not a program for x86-64"));
    }
    let headers = header.program_headers(endian, program).map_err(|_| malformed("it is truncated"))?;
    for segment in headers {
        if let Ok(Some(interpreter)) = segment.interpreter(endian, program) {
            let interpreter = String::from_utf8_lossy(interpreter).into_owned();
            return Err(Error::AgentNotStatic { path: path.to_owned(), interpreter });
        }
        if segment.p_type(endian) == PT_INTERP {
            return Err(malformed("its interpreter cannot be read"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_refused_with_the_remedy() {
        let error = Agent::find(Some(Path::new("/bin/ls"))).unwrap_err().to_string();
        assert!(error.starts_with("/bin/ls is dynamically linked (needs /lib64/ld-linux-x86-64.so.2)"), "{error}");
        assert!(error.contains("crt-static"), "{error}");
    }

    #[test]
    fn a_script_is_refused() {
        let error = check_static(Path::new("agent.sh"), b"#!/bin/sh\n").unwrap_err().to_string();
        assert_eq!(error, "the agent agent.sh is not usable: it is not a 64-bit ELF program");
    }

    #[test]
    fn a_missing_agent_is_named() {
        let error = Agent::find(Some(Path::new("/nonexistent/agent"))).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nonexistent/agent: "), "{error}");
    }
}
