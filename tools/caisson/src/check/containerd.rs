//! Does containerd know the runtime?

use std::{os::unix::fs::FileTypeExt, path::Path};

use caisson_config_service::installation::Installation;

use super::Finding;
use crate::{
    install::containerd::{CONFIG, Registered, SHIM, registered},
    program,
};

const SOCKET: &str = "/run/containerd/containerd.sock";

/// Every finding about containerd.
pub(super) async fn examine(installation: &Installation) -> Vec<Finding> {
    let mut findings = vec![containerd(installation).await, running()];
    let text = dump(installation).await;
    findings.push(registration(registered(&text).as_deref()));
    findings.push(shim(installation));
    findings
}

async fn containerd(installation: &Installation) -> Finding {
    let Some(path) = program::find(&installation.program_dirs, "containerd") else {
        return Finding::fail("containerd", "not on the PATH", "install containerd 1.6 or newer");
    };
    match program::version(&path).await {
        Ok(version) => Finding::pass("containerd", version),
        Err(error) => Finding::fail("containerd", format!("{error:#}"), "install containerd 1.6 or newer"),
    }
}

fn running() -> Finding {
    let is_socket = std::fs::metadata(SOCKET).is_ok_and(|metadata| metadata.file_type().is_socket());
    match is_socket.then(|| std::os::unix::net::UnixStream::connect(SOCKET)) {
        Some(Ok(_)) => Finding::pass("containerd runs", SOCKET),
        Some(Err(error)) => Finding::warn("containerd runs", format!("{SOCKET}: {error}"), START),
        None => Finding::warn("containerd runs", format!("there is no {SOCKET}"), START),
    }
}

const START: &str = "systemctl start containerd";

/// What containerd itself makes of its configuration, imports included; the bare file where it does not tell.
async fn dump(installation: &Installation) -> String {
    if let Some(containerd) = program::find(&installation.program_dirs, "containerd")
        && Path::new(CONFIG).exists()
        && let Ok(dump) = program::ask(&containerd, &["config", "dump"]).await
    {
        return dump;
    }
    crate::host::read(CONFIG)
}

fn registration(registered: Result<&[Registered], &anyhow::Error>) -> Finding {
    const SUBJECT: &str = "CRI runtimes";
    let remedy = "for Kubernetes run `caisson install`; ctr and nerdctl need no registration";
    match registered {
        Ok([]) => Finding::warn(SUBJECT, format!("none is caisson's in {CONFIG}"), remedy),
        Ok(runtimes) => {
            let gone = runtimes.iter().filter_map(|runtime| runtime.config_path.as_ref()).find(|file| !file.exists());
            let names: Vec<_> = runtimes.iter().map(|runtime| runtime.name.as_str()).collect();
            match gone {
                Some(file) => Finding::fail(
                    SUBJECT,
                    format!("{}: {} does not exist", names.join(", "), file.display()),
                    "run `caisson install` again, or mend ConfigPath",
                ),
                None => Finding::pass(SUBJECT, names.join(", ")),
            }
        }
        Err(error) => Finding::fail(SUBJECT, format!("read {CONFIG}: {error:#}"), "mend the file"),
    }
}

fn shim(installation: &Installation) -> Finding {
    match program::find(&installation.program_dirs, SHIM) {
        Some(path) => Finding::pass("shim", path.display().to_string()),
        None => Finding::fail("shim", format!("there is no {SHIM}"), "run `caisson install`"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn a_runtime_whose_configuration_is_gone_fails() {
        let runtime = Registered { name: "caisson-fc".into(), config_path: Some("/nonexistent/fc.toml".into()) };
        let told = registration(Ok(&[runtime]));
        assert_eq!(
            (told.verdict, told.found.as_str()),
            (Verdict::Fail, "caisson-fc: /nonexistent/fc.toml does not exist")
        );
    }

    #[test]
    fn without_registration_ctr_still_works() {
        let told = registration(Ok(&[]));
        assert_eq!(told.verdict, Verdict::Warn);
        assert!(told.remedy.unwrap().contains("ctr and nerdctl need no registration"));
    }
}
