//! `cargo xtask test-kvm`: what can be tested only where KVM works: in test hosts, where this machine has no KVM of
//! its own, one batch of tests after the other.

use std::{
    fs,
    io::stdout,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use caisson_testbed::{Accelerator, Cache, Hypervisor, Installation};

use crate::{
    build::{self, cargo},
    step::{run, step},
    test_host::{Image, Machine, Task, TestHost},
};

/// Room for a guest of 8 GiB. One processor: with several, the emulated ones do not always keep the order in which guests
/// are switched, and the test host's kernel dies of it.
const MACHINE: Machine = Machine { icount: false, cpus: 1, memory_mib: 9600 };
const LIMIT: Duration = Duration::from_secs(1200);
/// How many test hosts there are at a time.
const LANES: usize = 2;
/// How often a batch is tried whose test host is not fit for it; a test that fails is not tried again here.
const BOOTS: usize = 4;
/// What a test host ends with in which KVM does not run Debian's own QEMU well: `EX_TEMPFAIL` of `sysexits.h`.
const UNFIT: u8 = 75;
/// Nextest's own settings for it, in .config/nextest.toml.
const PROFILE: &str = "kvm";
/// And those for [`SIGN_OF_FITNESS`].
const FITNESS_PROFILE: &str = "kvm-fitness";
/// Backends that have to run where KVM works; see the launchers' suite.
const REQUIRED: &str = "builtin qemu";

/// A guest of QEMU that waits for timers until it is off. Now and then a test host boots in which they come late or never.
const SIGN_OF_FITNESS: &str = "binary(launcher) and test(=life::qemu::a_guest_that_powers_off_ends_its_vm)";

/// One container with a second process.
const SIGN_OF_LIFE: &str = "binary(end_to_end) and test(=lifecycle::exec_has_streams_and_an_exit_code_of_its_own)";

/// Some tests, in one boot of the test host, with one hypervisor and one guest kernel.
struct Batch {
    name: &'static str,
    tests: &'static str,
    hypervisor: &'static str,
    /// Beside the installation's kernel.
    kernel: &'static str,
    options: &'static str,
}

impl Batch {
    const fn suite(name: &'static str, tests: &'static str) -> Self {
        Self { name, tests, hypervisor: Hypervisor::QEMU, kernel: "vmlinux", options: "" }
    }

    const fn builtin(name: &'static str, tests: &'static str, kernel: &'static str) -> Self {
        Self { name, tests, hypervisor: Hypervisor::BUILTIN, kernel, options: "" }
    }

    const fn qemu(name: &'static str, tests: &'static str, kernel: &'static str) -> Self {
        Self { name, tests, hypervisor: Hypervisor::QEMU, kernel, options: "accel=kvm" }
    }
}

const BATCHES: [Batch; 9] = [
    Batch::suite("every launcher: devices", "binary(launcher) and test(/^devices::/)"),
    Batch::suite("every launcher: disks and integrity", "binary(launcher) and test(/^(disks|integrity)::/)"),
    Batch::suite("every launcher: life", "binary(launcher) and test(/^(life|snapshot)::/)"),
    // But what is typed at a serial port, which does not reach a guest in the emulated machine.
    Batch::suite(
        "every launcher: refusals and terminals",
        "binary(launcher) and test(/^(refusals|terminal)::/) and not test(/::a_guest_in_a_pipe/)",
    ),
    Batch::builtin(
        "built-in VMM: containers",
        "binary(end_to_end) and test(/^(crashes|lifecycle|streams)::/)",
        "vmlinux",
    ),
    Batch::builtin("built-in VMM: pods and sizes", "binary(end_to_end) and test(/^(guest|pod|sizes)::/)", "vmlinux"),
    Batch::builtin("built-in VMM: Debian's bzImage", SIGN_OF_LIFE, "bzImage"),
    Batch::qemu("QEMU with KVM: pods", "binary(end_to_end) and test(/^pod::/)", "vmlinux"),
    Batch::qemu("QEMU with KVM: Debian's bzImage", SIGN_OF_LIFE, "bzImage"),
];

/// Runs all of it, here or in a test host.
pub fn test(installation: &Installation) -> Result<()> {
    let nextest = step("find cargo-nextest", || build::nextest(&Cache::open()?))?;
    let metadata = step("list the tests", || Metadata::write(installation, &nextest))?;
    let accelerator = Accelerator::find(&installation.programs)?;
    if accelerator.is_kvm() {
        return all(1, |_, batch| batch.run_here(installation, &nextest, &metadata));
    }
    eprintln!("    a test host is needed here: {}", accelerator.reason);
    let image = step("build the test host", || Image::build(Image::SUITE))?;
    let mut host = TestHost::new(installation, image, MACHINE)?;
    host.share(nextest.parent().context("cargo-nextest is in no folder")?)?;
    let program = installation.programs.join("xtask").display().to_string();
    let nextest = nextest.display().to_string();
    all(LANES, |number, _| {
        let number = number.to_string();
        let command = [&program, "--no-setup", "test-kvm", "--batch", &number, "--here", &nextest]
            .map(|word: &str| word.to_owned());
        run_in(&host, &Task { command: &command, stdin: false, console: false, limit: LIMIT })
    })
}

/// Runs one batch on this machine, a test host, with what [`test`] has left.
pub fn test_as_prepared(installation: &Installation, nextest: &Path, batch: usize) -> Result<ExitCode> {
    let batch = BATCHES.get(batch).with_context(|| format!("there is no batch {batch}"))?;
    let metadata = Metadata::of(installation);
    let fitness = Batch::suite("fitness", SIGN_OF_FITNESS);
    if let Err(error) = fitness.run_with(installation, metadata.nextest(nextest, FITNESS_PROFILE)) {
        eprintln!("    the test host is not fit for tests: {error:#}");
        return Ok(ExitCode::from(UNFIT));
    }
    batch.run_here(installation, nextest, &metadata)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs every batch, `lanes` of them at a time, whatever became of the others.
fn all(lanes: usize, run: impl Fn(usize, &Batch) -> Result<()> + Sync) -> Result<()> {
    let (waiting, failed) = (Mutex::new(BATCHES.iter().enumerate()), Mutex::new(Vec::new()));
    let next = || waiting.lock().expect("no lane panics").next();
    let lane = || {
        while let Some((number, batch)) = next() {
            if let Err(error) = step(&format!("KVM: {}", batch.name), || run(number, batch)) {
                eprintln!("error: {}: {error:#}", batch.name);
                failed.lock().expect("no lane panics").push(batch.name);
            }
        }
    };
    std::thread::scope(|scope| (0..lanes).for_each(|_| drop(scope.spawn(lane))));
    let failed = failed.into_inner().expect("no lane panics");
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}", failed.join(", ")) }
}

/// A test host may die of its emulated processor, or not be fit from the start. That is told, and is no verdict on the tests:
/// it boots again.
fn run_in(host: &TestHost, task: &Task<'_>) -> Result<()> {
    for boot in 1..=BOOTS {
        match host.run(task, &mut stdout()) {
            Ok(0) => return Ok(()),
            Ok(UNFIT) => eprintln!("    boot {boot} of the test host: its emulated processor does not run guests well"),
            Ok(code) => bail!("tests failed in the test host (exit code {code})"),
            Err(error) if boot < BOOTS => eprintln!("    boot {boot} of the test host: {error:#}"),
            Err(error) => return Err(error),
        }
    }
    bail!("the test host does not stay alive")
}

impl Batch {
    fn run_here(&self, installation: &Installation, nextest: &Path, metadata: &Metadata) -> Result<()> {
        self.run_with(installation, metadata.nextest(nextest, PROFILE))
    }

    fn run_with(&self, installation: &Installation, mut command: Command) -> Result<()> {
        command.args(["-E", self.tests]).env("CAISSON_REQUIRED_BACKENDS", REQUIRED);
        command.env("TESTBED_HYPERVISOR", self.hypervisor).env("TESTBED_OPTIONS", self.options);
        command.env("TESTBED_KERNEL", installation.kernel.with_file_name(self.kernel));
        command.env("CAISSON_LAUNCHERS", &installation.programs);
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

    fn nextest(&self, program: &Path, profile: &str) -> Command {
        let mut nextest = Command::new(program);
        nextest.args(["nextest", "run", "--profile", profile, "--no-tests=fail"]);
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
