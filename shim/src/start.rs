//! `start`: containerd asks for a shim. Makes one per pod and answers where it listens.

use std::{
    env, fs,
    io::{self, IsTerminal, Read, Write},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

use caisson_protocol::{
    containerd::bootstrap_api::{BootstrapParams, BootstrapResult},
    id::Id,
    listen,
    paths::SandboxDir,
    processes::ProcessId,
};
use nix::{fcntl::OFlag, sys::utsname::uname};
use protobuf::Message;

use crate::{
    Error, Result,
    bundle::{Bundle, Role},
    cli::Flags,
    delete::clean_up,
    record::Record,
};

/// containerd looks here for the socket when it has been restarted.
const ADDRESS_FILE: &str = "address";
/// containerd reads the shim's log from this fifo in the bundle.
const LOG_FIFO: &str = "log";
/// The most that containerd sends.
const MAX_INPUT: u64 = 10 << 20;

/// Runs with the bundle as working directory.
pub fn start(flags: &Flags) -> Result<()> {
    let bundle = Bundle::load(Path::new("."))?;
    let address = match bundle.role()? {
        Role::PodMember(sandbox) => find_shim(&flags.namespace, sandbox)?,
        Role::Single | Role::PodSandbox => spawn_shim(flags)?,
    };
    fs::write(ADDRESS_FILE, &address).map_err(Error::host("write the bundle's address file"))?;
    answer(flags, &address).map_err(Error::host("answer containerd"))
}

/// `-info`: what containerd 2.x shows of a runtime.
pub fn print_info() -> Result<()> {
    use caisson_protocol::containerd::types::introspection::{RuntimeInfo, RuntimeVersion};
    let release = uname().map(|system| system.release().to_string_lossy().into_owned()).unwrap_or_default();
    let info = RuntimeInfo {
        name: "io.containerd.caisson.v2".into(),
        version: protobuf::MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            revision: release,
            ..Default::default()
        }),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(|error| Error::host("describe the runtime")(io::Error::other(error)))?;
    io::stdout().write_all(&bytes).map_err(Error::host("describe the runtime"))
}

fn find_shim(namespace: &Id, sandbox: Id) -> Result<String> {
    let socket = SandboxDir::of(namespace, &sandbox).shim_socket();
    if socket.exists() {
        Ok(format!("unix://{}", socket.display()))
    } else {
        Err(Error::NotFound { what: "sandbox", id: sandbox })
    }
}

fn spawn_shim(flags: &Flags) -> Result<String> {
    let dir = SandboxDir::of(&flags.namespace, &flags.id);
    make_directory(&dir, &flags.id)?;
    let socket = dir.shim_socket();
    let spawned = (|| {
        let listener =
            listen::bind(&socket).map_err(Error::host(format!("make the shim's socket {}", socket.display())))?;
        let program = env::current_exe().map_err(Error::host("find this program"))?;
        Command::new(&program)
            .args(["-namespace", flags.namespace.as_str(), "-id", flags.id.as_str()])
            .args(flags.debug.then_some("-debug"))
            .stdin(listen::as_stdin(listener))
            .stdout(Stdio::null())
            .stderr(log_output())
            // Signals to containerd's process group are not for the shim.
            .process_group(0)
            .spawn()
            .map_err(Error::host(format!("start the shim {}", program.display())))
    })();
    match spawned {
        Ok(_) => Ok(format!("unix://{}", socket.display())),
        Err(error) => {
            clean_up(&dir);
            Err(error)
        }
    }
}

/// Makes the sandbox's directory; one that a dead shim left is cleaned up first.
fn make_directory(dir: &SandboxDir, id: &Id) -> Result<()> {
    match dir.create() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let alive = Record::load(dir).is_some_and(|record| ProcessId::of(record.shim_pid).is_some());
            if alive {
                return Err(Error::Exists { what: "sandbox", id: id.clone() });
            }
            clean_up(dir);
            dir.create()
        }
        outcome => outcome,
    }
    .map_err(Error::host(format!("make the sandbox directory {}", dir.path().display())))
}

/// The bundle's log fifo, open for both so that writing never waits nor breaks while containerd restarts.
fn log_output() -> Stdio {
    let fifo = fs::OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(LOG_FIFO);
    fifo.map_or_else(|_| Stdio::null(), Stdio::from)
}

/// containerd before 2.3 reads an address and takes the shim for one of the Task API's version 2, which is served
/// beside version 3; later ones send a message and read one.
fn answer(flags: &Flags, address: &str) -> io::Result<()> {
    let mut stdout = io::stdout();
    if sent_bootstrap_params(flags)? {
        let result =
            BootstrapResult { version: 3, address: address.into(), protocol: "ttrpc".into(), ..Default::default() };
        stdout.write_all(&result.write_to_bytes()?)?;
    } else {
        stdout.write_all(address.as_bytes())?;
    }
    stdout.flush()
}

fn sent_bootstrap_params(flags: &Flags) -> io::Result<bool> {
    let mut input = Vec::new();
    if !io::stdin().is_terminal() {
        io::stdin().take(MAX_INPUT).read_to_end(&mut input)?;
    }
    let params = BootstrapParams::parse_from_bytes(&input).unwrap_or_default();
    Ok(params.instance_id == flags.id.as_str() && params.namespace == flags.namespace.as_str())
}
