//! `cargo xtask test-kvm`: what can be tested only where KVM works: in test hosts, where this machine has no KVM of
//! its own, one batch of tests after the other.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use caisson_testbed::{Accelerator, Cache, Guest, Hypervisor, Installation};

use crate::{
    build::{self, cargo},
    peers::Peers,
    results::Results,
    step::{run, step},
    test_host::{Clock, Image, Machine, Task, TestHost},
};

/// Room for a guest of 8 GiB.
const MEMORY_MIB: u64 = 9600;
const LIMIT: Duration = Duration::from_secs(900);
/// How many test hosts there are at a time.
const LANES: usize = 2;
/// How many test hosts a batch is given at the most, should they die.
const BOOTS: usize = 3;
/// And in how many its tests may fail. What fails in the first is told, whatever becomes of it in the second.
const TRIES: usize = 2;
/// Nextest's own settings for it, in .config/nextest.toml.
const PROFILE: &str = "kvm";
/// Backends that have to run where KVM works, beside those whose programs were found; see the launchers' suite.
const REQUIRED: [&str; 2] = ["builtin", "qemu"];

/// Guests of several processors, of every hypervisor.
const SEVERAL_PROCESSORS: &str = "test(/^(life|sizes)::/) and test(/_processors_|::processors_|_cpus_/) \
                                  or test(/::a_card_keeps_every_byte$/)";

/// How many pods come and go, one after the other.
const POD_CYCLES: &str = "25";

/// One container with a second process.
const SIGN_OF_LIFE: &str = "binary(end_to_end) and test(=lifecycle::exec_has_streams_and_an_exit_code_of_its_own)";

/// What `ctr` does with a container and with a pod, what becomes of them when a program is killed, and what cannot start. Not
/// every hypervisor has a file system daemon.
const CONTAINERS: &str = "binary(end_to_end) and not test(/file_system_daemon/) and \
                          test(/^(crashes|errors|lifecycle|pod|streams)::|^guest::a_guest_may_have_its_root_on_a_disk/)";

/// The heart of those; with QEMU, all of them run without KVM, too.
const ESSENTIALS: &str = "binary(end_to_end) and test(/^(lifecycle::(exec_has|exec_on|kill)|streams::(a_hundred|what_is)|pod::|\
                          crashes::a_(killed_(hypervisor|launcher)|hypervisor_that))/)";

/// Some tests, in one boot of the test host, with one hypervisor and one guest kernel.
struct Batch {
    name: &'static str,
    tests: &'static str,
    hypervisor: &'static str,
    guest: BatchGuest,
    options: &'static str,
    processors: Processors,
}

/// How many processors its guests have at the most.
#[derive(Clone, Copy)]
enum Processors {
    One,
    Several,
}

impl Processors {
    /// What the clock of a batch's test host goes by. By its own work, nothing is late because this machine is busy; but
    /// processors that wait for each other do so in loops of `pause` instructions ([`Clock::Work`]).
    const fn clock(self) -> Clock {
        match self {
            Self::One => Clock::Work,
            Self::Several => Clock::Host { cpus: 1 },
        }
    }
}

/// What a batch boots.
#[derive(Clone, Copy)]
enum BatchGuest {
    /// With image-builder's kernel, uncompressed.
    Own,
    /// The same kernel, compressed.
    OwnCompressed,
    /// With Debian's kernel as it is.
    Debian,
}

impl BatchGuest {
    fn of(self, installation: &Installation) -> Guest {
        let Installation { guest, debian_guest, .. } = installation;
        let compressed = |guest: &Guest| Guest { kernel: guest.kernel.with_file_name("bzImage"), ..guest.clone() };
        match self {
            Self::Own => guest.clone(),
            Self::OwnCompressed => compressed(guest),
            Self::Debian => compressed(debian_guest),
        }
    }
}

impl Batch {
    const fn suite(name: &'static str, tests: &'static str) -> Self {
        Self::of(name, tests, Hypervisor::QEMU, BatchGuest::Own)
    }

    const fn builtin(name: &'static str, tests: &'static str, guest: BatchGuest) -> Self {
        Self::of(name, tests, Hypervisor::BUILTIN, guest)
    }

    /// Another hypervisor's; passed over where its program is not found.
    const fn peer(name: &'static str, hypervisor: &'static str, tests: &'static str) -> Self {
        Self::of(name, tests, hypervisor, BatchGuest::Own)
    }

    /// Another one's that boots a compressed kernel only.
    const fn compressed_peer(name: &'static str, hypervisor: &'static str, tests: &'static str) -> Self {
        Self::of(name, tests, hypervisor, BatchGuest::OwnCompressed)
    }

    /// QEMU's, whose KVM is not to be replaced by emulation.
    const fn qemu(name: &'static str, tests: &'static str, guest: BatchGuest) -> Self {
        Self { options: "accel=kvm", ..Self::of(name, tests, Hypervisor::QEMU, guest) }
    }

    const fn with_options(self, options: &'static str) -> Self {
        Self { options, ..self }
    }

    const fn of(name: &'static str, tests: &'static str, hypervisor: &'static str, guest: BatchGuest) -> Self {
        Self { name, tests, hypervisor, guest, options: "", processors: Processors::One }
    }

    const fn with_several_processors(self) -> Self {
        Self { processors: Processors::Several, ..self }
    }
}

const BATCHES: [Batch; 22] = [
    Batch::suite("every launcher: devices", "binary(launcher) and test(/^(devices|vfio)::/)"),
    Batch::suite("every launcher: shared directories", "binary(launcher) and test(/^integrity::.*_share_/)"),
    Batch::suite("every launcher: vsock", "binary(launcher) and test(/^integrity::.*::vsock_/)"),
    Batch::suite("every launcher: disks", "binary(launcher) and test(/^disks::/)"),
    Batch::suite("every launcher: life", "binary(launcher) and test(/^(balloon|life|memory|sizes|snapshot)::/)"),
    Batch::suite("every launcher: several processors", "binary(launcher)").with_several_processors(),
    Batch::suite(
        "every launcher: adoption, capabilities, refusals and terminals",
        "binary(launcher) and test(/^(adoption|capabilities|refusals|terminal)::/)",
    ),
    Batch::suite("every launcher: network cards, and a hundred VMs", "binary(launcher) and test(/^(cards|cycles)::/)"),
    Batch::builtin(
        "built-in VMM: containers",
        "binary(end_to_end) and test(/^(crashes|errors|lifecycle|streams)::/)",
        BatchGuest::Own,
    ),
    Batch::builtin(
        "built-in VMM: pods and sizes",
        "binary(end_to_end) and test(/^(cri|guest|pod|sizes)::/)",
        BatchGuest::Own,
    ),
    Batch::builtin("built-in VMM: several processors", "binary(end_to_end)", BatchGuest::Own).with_several_processors(),
    Batch::builtin("built-in VMM: pods that come and go", "binary(end_to_end) and test(/^cycles::/)", BatchGuest::Own),
    Batch::builtin("built-in VMM: a compressed kernel", SIGN_OF_LIFE, BatchGuest::OwnCompressed),
    Batch::builtin("built-in VMM: Debian's kernel", "binary(end_to_end) and test(/^pod::/)", BatchGuest::Debian),
    Batch::qemu("QEMU microvm with KVM: containers and pods", ESSENTIALS, BatchGuest::Own),
    Batch::qemu("QEMU q35 with KVM: containers and pods", ESSENTIALS, BatchGuest::Own)
        .with_options("accel=kvm machine_type=q35"),
    Batch::qemu("QEMU with KVM: Debian's kernel", SIGN_OF_LIFE, BatchGuest::Debian),
    Batch::peer("Firecracker: containers and pods", "firecracker", CONTAINERS),
    Batch::peer(
        "Firecracker: root file systems on disks",
        "firecracker",
        "binary(end_to_end) and test(/^block_rootfs::/)",
    ),
    Batch::peer("Cloud Hypervisor: containers and pods", "cloud-hypervisor", CONTAINERS),
    Batch::peer(
        "Cloud Hypervisor: root file systems on disks",
        "cloud-hypervisor",
        "binary(end_to_end) and test(/^block_rootfs::/)",
    ),
    Batch::compressed_peer("StratoVirt: containers and pods", "stratovirt", CONTAINERS),
];

/// Runs the batches whose names contain one of `only`, or all, here or in a test host.
pub fn test(installation: &Installation, only: &[String]) -> Result<()> {
    let is_wanted = |batch: &Batch| only.is_empty() || only.iter().any(|name| batch.name.contains(name.as_str()));
    let names = || BATCHES.iter().map(|batch| batch.name).collect::<Vec<_>>().join("\n");
    ensure!(BATCHES.iter().any(is_wanted), "no batch is called {}; there are:\n{}", only.join(" or "), names());
    let nextest = step("find cargo-nextest", || build::nextest(&Cache::open()?))?;
    let metadata = step("list the tests", || Metadata::write(installation, &nextest))?;
    let peers = step("look for hypervisors", || Peers::find(installation))?;
    let batches = BATCHES.iter().enumerate().filter(|(_, batch)| is_wanted(batch) && batch.can_run(&peers));
    let accelerator = Accelerator::find(&installation.programs)?;
    let (lines, verdict) = if accelerator.is_kvm() {
        let here = Here { installation, nextest: &nextest, metadata: &metadata, peers: &peers };
        all(1, batches, |_, batch| here.run_recorded(batch))
    } else {
        eprintln!("    a test host is needed here: {}", accelerator.reason);
        let image = step("build the test host", || Image::build(Image::SUITE))?;
        let program = installation.programs.join("xtask").display().to_string();
        let folder_of_nextest = nextest.parent().context("cargo-nextest is in no folder")?.to_owned();
        let nextest = nextest.display().to_string();
        let folder = format!("CAISSON_HYPERVISORS={}", peers.folder.display());
        let host = |clock| {
            let machine = Machine { clock, memory_mib: MEMORY_MIB };
            let mut host = TestHost::new(installation, image.clone(), machine)?;
            host.share(&folder_of_nextest)?;
            Ok(host)
        };
        all(LANES, batches, |number, batch| {
            let number = number.to_string();
            let command =
                ["/usr/bin/env", &folder, &program, "--no-setup", "test-kvm", "--batch", &number, "--here", &nextest]
                    .map(|word: &str| word.to_owned());
            run_in(host, batch, &Task { command: &command, stdin: false, console: false, limit: LIMIT })
        })
    };
    fs::write(Results::path(installation), &lines).context("keep the results")?;
    let results = Results::parse(&lines);
    println!("\n{}", results.to_markdown(&peers.missing()));
    results.summary().iter().for_each(|line| println!("{line}"));
    verdict
}

/// Runs one batch on this machine, a test host, with what [`test`] has left. Standard output gets the results.
pub fn test_as_prepared(installation: &Installation, nextest: &Path, batch: usize) -> Result<ExitCode> {
    let batch = BATCHES.get(batch).with_context(|| format!("there is no batch {batch}"))?;
    let peers = Peers::as_prepared();
    let here = Here { installation, nextest, metadata: &Metadata::of(installation), peers: &peers };
    let (results, verdict) = here.run_recorded(batch)?;
    print!("{results}");
    verdict.map(|()| ExitCode::SUCCESS)
}

/// Runs every batch, `lanes` of them at a time, whatever became of the others; and what they found, in lines.
fn all<'a>(
    lanes: usize,
    batches: impl Iterator<Item = (usize, &'a Batch)> + Send,
    run: impl Fn(usize, &Batch) -> Result<(String, Result<()>)> + Sync,
) -> (String, Result<()>) {
    let (waiting, failed, lines) = (Mutex::new(batches), Mutex::new(Vec::new()), Mutex::new(String::new()));
    let next = || waiting.lock().expect("no lane panics").next();
    let lane = || {
        while let Some((number, batch)) = next() {
            let verdict = step(&format!("KVM: {}", batch.name), || {
                let (found, verdict) = run(number, batch)?;
                lines.lock().expect("no lane panics").push_str(&found);
                verdict
            });
            if let Err(error) = verdict {
                eprintln!("error: {}: {error:#}", batch.name);
                failed.lock().expect("no lane panics").push(batch.name);
            }
        }
    };
    std::thread::scope(|scope| (0..lanes).for_each(|_| drop(scope.spawn(lane))));
    let failed = failed.into_inner().expect("no lane panics");
    let verdict = if failed.is_empty() { Ok(()) } else { Err(anyhow!("failed: {}", failed.join(", "))) };
    (lines.into_inner().expect("no lane panics"), verdict)
}

/// A test host that dies is no verdict on the tests, and another one boots. Tests that fail are tried in one more, too,
/// which has done nothing before.
fn run_in(host: impl Fn(Clock) -> Result<TestHost>, batch: &Batch, task: &Task<'_>) -> Result<(String, Result<()>)> {
    let (mut boots, mut failures) = (0, 0);
    loop {
        boots += 1;
        let mut output = Vec::new();
        let verdict = match host(batch.processors.clock())?.run(task, &mut output) {
            Ok(0) => Ok(()),
            Ok(code) => {
                failures += 1;
                Err(anyhow!("tests failed in the test host (exit code {code})"))
            }
            Err(error) => Err(error),
        };
        match verdict {
            Err(error) if boots < BOOTS && failures < TRIES => {
                eprintln!("    boot {boots} of the test host: {error:#}; once more in another");
            }
            verdict => return Ok((String::from_utf8_lossy(&output).into_owned(), verdict)),
        }
    }
}

impl Batch {
    fn filter(&self) -> String {
        let operator = match self.processors {
            Processors::One => "and not",
            Processors::Several => "and",
        };
        format!("({}) {operator} ({SEVERAL_PROCESSORS})", self.tests)
    }

    fn can_run(&self, peers: &Peers) -> bool {
        REQUIRED.contains(&self.hypervisor) || peers.found.contains(&self.hypervisor)
    }
}

/// A machine where KVM works.
struct Here<'a> {
    installation: &'a Installation,
    nextest: &'a Path,
    metadata: &'a Metadata,
    peers: &'a Peers,
}

impl Here<'_> {
    /// Runs a batch; what it found, in lines, and whether its tests passed.
    fn run_recorded(&self, batch: &Batch) -> Result<(String, Result<()>)> {
        let results = tempfile::NamedTempFile::new().context("make a file for the results")?;
        let verdict = self.run(batch, results.path());
        Ok((fs::read_to_string(results.path()).context("read the results")?, verdict))
    }

    fn run(&self, batch: &Batch, results: &Path) -> Result<()> {
        let required: Vec<&str> = REQUIRED.iter().chain(&self.peers.found).copied().collect();
        let mut command = self.metadata.nextest(self.nextest);
        command.args(["-E", &batch.filter()]).env("CAISSON_REQUIRED_BACKENDS", required.join(" "));
        command.env("TESTBED_HYPERVISOR", batch.hypervisor).env("TESTBED_OPTIONS", batch.options);
        let Guest { kernel, initrd } = batch.guest.of(self.installation);
        command.env("TESTBED_KERNEL", kernel).env("TESTBED_INITRD", initrd);
        command.env("CAISSON_LAUNCHERS", &self.installation.programs).env("CAISSON_HYPERVISORS", &self.peers.folder);
        command.env("TESTBED_CYCLES", POD_CYCLES).env("CAISSON_RESULTS", results);
        run(&mut command)
    }
}

/// What nextest must know to run test binaries where there is no cargo.
struct Metadata {
    binaries: PathBuf,
    cargo: PathBuf,
}

impl Metadata {
    fn of(installation: &Installation) -> Self {
        let folder = installation.programs.join("test-kvm");
        Self { binaries: folder.join("binaries.json"), cargo: folder.join("cargo.json") }
    }

    /// Builds the tests and leaves their list.
    fn write(installation: &Installation, nextest: &Path) -> Result<Self> {
        let metadata = Self::of(installation);
        let folder = metadata.cargo.parent().context("the metadata is in no folder")?;
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let mut list = Command::new(nextest);
        list.args([
            "nextest",
            "list",
            "--release",
            "--workspace",
            "--list-type=binaries-only",
            "--message-format=json",
        ]);
        fs::write(&metadata.binaries, output(list.current_dir(Installation::workspace()))?).context("keep the list")?;
        let description = output(cargo().args(["metadata", "--format-version=1", "--no-deps"]))?;
        fs::write(&metadata.cargo, description).context("keep the workspace's description")?;
        Ok(metadata)
    }

    fn nextest(&self, program: &Path) -> Command {
        let mut nextest = Command::new(program);
        nextest.args(["nextest", "run", "--profile", PROFILE, "--no-tests=fail"]);
        nextest.arg("--binaries-metadata").arg(&self.binaries).arg("--cargo-metadata").arg(&self.cargo);
        nextest.current_dir(Installation::workspace());
        nextest
    }
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().display().to_string();
    let output = command.stderr(std::process::Stdio::inherit()).output().with_context(|| format!("execute {name}"))?;
    ensure!(output.status.success(), "{name} ended with {}", output.status);
    Ok(output.stdout)
}
