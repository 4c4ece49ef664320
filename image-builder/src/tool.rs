//! Runs the programs that the build calls, and says in one sentence which is missing or what it complained of.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};

use crate::error::{Error, Result};

/// At most this much of a program's standard error goes into an error message, in bytes.
const MAX_WORDS: usize = 600;

/// Program and the Debian package that has it.
const PACKAGES: &[(&str, &str)] = &[
    ("apt-cache", "apt"),
    ("apt-get", "apt"),
    ("/usr/lib/apt/apt-helper", "apt"),
    ("dpkg-query", "dpkg"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("gzip", "gzip"),
    ("mkfs.erofs", "erofs-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("mmdebstrap", "mmdebstrap"),
    ("strip", "binutils"),
    ("objcopy", "binutils"),
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("tar", "tar"),
];

/// One program call: what to run, and what for.
pub struct Tool {
    program: String,
    purpose: String,
    command: Command,
}

impl Tool {
    /// `purpose` completes the sentences "is needed to …" and "cannot …".
    pub fn new(program: &str, purpose: impl Into<String>) -> Self {
        let mut command = Command::new(program);
        // sbin is not on everybody's path; messages are parsed and shown in one language.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        Self { program: program.to_owned(), purpose: purpose.into(), command }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs in this directory.
    pub fn current_dir(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Connects standard input.
    pub fn stdin(mut self, input: impl Into<Stdio>) -> Self {
        self.command.stdin(input);
        self
    }

    /// Connects standard output.
    pub fn stdout(mut self, output: impl Into<Stdio>) -> Self {
        self.command.stdout(output);
        self
    }

    /// Connects standard error, for [`Tool::spawn`].
    pub fn stderr(mut self, output: impl Into<Stdio>) -> Self {
        self.command.stderr(output);
        self
    }

    /// Runs to the end; standard output is returned.
    pub fn run(self) -> Result<String> {
        let Self { program, purpose, mut command } = self;
        let output = command.stderr(Stdio::piped()).output();
        let output = output.map_err(|error| spawn_error(&program, &purpose, error))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Tool { words: words(&output), status: status_words(output.status), program, purpose })
    }

    /// Runs to the end and returns all that it wrote, however it ends: for asking a program about itself.
    pub fn run_merged(self) -> Result<String> {
        let Self { program, purpose, mut command } = self;
        let output = command.output().map_err(|error| spawn_error(&program, &purpose, error))?;
        Ok([output.stdout, output.stderr].iter().map(|text| String::from_utf8_lossy(text)).collect())
    }

    /// Starts it, for callers that show progress.
    pub fn spawn(self) -> Result<std::process::Child> {
        let Self { program, purpose, mut command } = self;
        command.spawn().map_err(|error| spawn_error(&program, &purpose, error))
    }
}

/// "exited with 1" or "was killed by signal 9".
pub fn status_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// The end of a program's words on one line.
pub fn last_words(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let joined = lines.join("; ");
    let start = joined.char_indices().map(|(index, _)| index).find(|index| joined.len() - index <= MAX_WORDS);
    joined[start.unwrap_or(0)..].to_owned()
}

/// First line of `program --version`, for the manifest.
pub fn version(program: &str) -> Result<String> {
    let output = Tool::new(program, "learn its version").arg("--version").run()?;
    Ok(output.lines().next().unwrap_or_default().trim().to_owned())
}

fn words(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.trim().is_empty() { last_words(&String::from_utf8_lossy(&output.stdout)) } else { last_words(&stderr) }
}

fn spawn_error(program: &str, purpose: &str, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound {
        let package = PACKAGES.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package);
        return Error::MissingTool {
            program: program.to_owned(),
            purpose: purpose.to_owned(),
            package: package.to_owned(),
        };
    }
    Error::Tool {
        program: program.to_owned(),
        purpose: purpose.to_owned(),
        status: "did not start".to_owned(),
        words: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = spawn_error("mkfs.erofs", "make an erofs image", io::ErrorKind::NotFound.into());
        assert_eq!(
            error.to_string(),
            "mkfs.erofs is needed to make an erofs image and is not installed; run: apt-get install erofs-utils"
        );
    }

    #[test]
    fn a_failing_program_is_quoted_on_one_line() {
        let error = Tool::new("sh", "try").args(["-c", "echo one >&2; echo two >&2; exit 3"]).run().unwrap_err();
        assert_eq!(error.to_string(), "cannot try: sh exited with 3: one; two");
    }

    #[test]
    fn last_words_keeps_the_end_within_the_bound() {
        let text = format!("{}é end", "é".repeat(MAX_WORDS));
        let kept = last_words(&text);
        assert!(kept.len() <= MAX_WORDS && kept.ends_with("é end"));
    }
}
