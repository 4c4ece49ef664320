//! Asks an installed hypervisor what it is and has: it is executed for that alone, and has ended when the answer is there.

use std::{future::Future, path::Path, time::Duration};

use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use crate::{
    Error, Result,
    outlive::Lifetime,
    process::{Ended, Process, Streams},
};

/// A program says what it is in some milliseconds, unless the host is very busy.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest that is read: help texts have some KiB.
const MAX_WORDS: u64 = 1 << 20;

/// The rest of the line that begins with `prefix`, of what `program argument` writes. `name` is what the program should be.
///
/// # Errors
/// When it cannot be executed, does not end in time, or is something else.
pub async fn version(program: &Path, argument: &str, name: &str, prefix: &str) -> Result<String> {
    let Said { words, ended } = words(program, &[argument]).await?;
    if let Some(version) = words.lines().find_map(|line| line.strip_prefix(prefix)) {
        return Ok(version.trim().to_owned());
    }
    let path = program.display();
    Err(Error::Invalid(match ended.well() {
        true => format!("{path} is not {name}: {argument} does not say so"),
        false => format!("{path} is not {name}, or does not work: {argument} {}", ended.how()),
    }))
}

/// What a program wrote, and how it ended.
#[derive(Debug)]
pub struct Said {
    /// On its standard output.
    pub words: String,
    /// With the end of what it wrote to its standard error.
    pub ended: Ended,
}

/// Executes `program arguments`, which reads nothing.
///
/// # Errors
/// When it cannot be executed or does not end in time.
pub async fn words(program: &Path, arguments: &[&str]) -> Result<Said> {
    words_within(DEADLINE, program, arguments).await
}

async fn words_within(limit: Duration, program: &Path, arguments: &[&str]) -> Result<Said> {
    let pipe = || {
        let (reader, writer) = std::io::pipe()?;
        Ok((pipe::Receiver::from_owned_fd(reader.into())?, writer))
    };
    let (reader, writer) = pipe().map_err(Error::host("make a pipe"))?;
    let streams = Streams { stdout: writer.into(), ..Streams::none() };
    let list: Vec<_> = arguments.iter().map(|&argument| argument.to_owned()).collect();
    let process = Process::start_with(program, &list, Vec::new(), streams, &Lifetime::of_launcher())?;
    let said = async {
        let mut words = Vec::new();
        // What is too long breaks off: then the pipe is closed.
        let _ = reader.take(MAX_WORDS).read_to_end(&mut words).await;
        Said { words: String::from_utf8_lossy(&words).into_owned(), ended: process.ended().await }
    };
    let late = || format!("{} {} does not end", program.display(), arguments.join(" "));
    within(limit, said, late, &process).await
}

/// What `process`, which was started for nothing else, answers to `questions`.
///
/// # Errors
/// Those of `questions`; when it does not answer in time, or ends before.
pub async fn answer<T>(process: Process, questions: impl Future<Output = Result<T>>) -> Result<T> {
    let answered = async {
        tokio::select! {
            // What ended explains why nothing answers.
            biased;
            ended = process.ended() => Err(Error::Hypervisor(process.describe(&ended))),
            answer = questions => answer,
        }
    };
    let late = || format!("{} does not answer", process.program().display());
    let answer = within(DEADLINE, answered, late, &process).await;
    process.kill();
    process.ended().await;
    answer?
}

/// How `process` ended, which is to end by itself.
///
/// # Errors
/// When it does not in time.
pub async fn end(process: &Process) -> Result<Ended> {
    within(DEADLINE, process.ended(), || format!("{} does not end", process.program().display()), process).await
}

/// `work`, unless it takes longer than `limit`: then `process` has ended, and `late` says what it does not do.
async fn within<T>(
    limit: Duration,
    work: impl Future<Output = T>,
    late: impl FnOnce() -> String,
    process: &Process,
) -> Result<T> {
    match timeout(limit, work).await {
        Ok(done) => Ok(done),
        Err(_) => {
            process.kill();
            process.ended().await;
            Err(Error::Hypervisor(format!("{} within {} s", late(), limit.as_secs())))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

    use super::*;

    /// A program that does what `script` says; its first argument is its only one.
    fn program(script: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hypervisor");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    }

    async fn version_of(script: &str) -> Result<String, String> {
        let (_dir, path) = program(script);
        let told = version(&path, "--version", "Boxer", "Boxer v").await;
        told.map_err(|error| error.to_string().replace(&path.display().to_string(), "PATH"))
    }

    #[tokio::test]
    async fn a_version_is_found_behind_its_prefix_on_any_line() {
        assert_eq!(version_of("echo starting; echo 'Boxer v1.2 '; echo bye").await.unwrap(), "1.2");
    }

    #[tokio::test]
    async fn another_program_is_not_what_it_should_be() {
        assert_eq!(version_of("echo hello").await.unwrap_err(), "PATH is not Boxer: --version does not say so");
    }

    #[tokio::test]
    async fn a_program_that_breaks_is_told_with_its_last_words() {
        assert_eq!(
            version_of("echo no such library >&2; exit 127").await.unwrap_err(),
            "PATH is not Boxer, or does not work: --version exited with status 127: no such library"
        );
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let error = version(Path::new("/nonexistent/boxer"), "--version", "Boxer", "Boxer v").await.unwrap_err();
        assert_eq!(error.to_string(), "execute /nonexistent/boxer");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_ended_at_the_deadline() {
        let (dir, path) = program("echo $$ > $0.pid; exec sleep 1000");
        let error = words_within(Duration::from_secs(1), &path, &["--version"]).await.unwrap_err().to_string();
        assert_eq!(error, format!("{} --version does not end within 1 s", path.display()));
        let pid = fs::read_to_string(dir.path().join("hypervisor.pid")).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }

    #[tokio::test]
    async fn a_program_that_never_stops_talking_is_heard_to_a_bound() {
        let (_dir, path) = program("exec yes");
        assert_eq!(words(&path, &[]).await.unwrap().words.len() as u64, MAX_WORDS);
    }

    #[tokio::test]
    async fn a_process_has_ended_when_its_answer_is_there() {
        let process = Process::start(Path::new("/bin/sleep"), &["1000".into()], Vec::new()).unwrap();
        let pid = process.pid();
        assert_eq!(answer(process, async { Ok(1) }).await.unwrap(), 1);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[tokio::test]
    async fn a_process_that_ends_before_its_answer_explains_why() {
        let arguments = ["-c".to_owned(), "echo no KVM >&2; exit 1".to_owned()];
        let process = Process::start(Path::new("/bin/sh"), &arguments, Vec::new()).unwrap();
        let error = answer::<()>(process, std::future::pending()).await.unwrap_err().to_string();
        assert!(error.ends_with("exited with status 1: no KVM"), "{error}");
    }
}
