//! Other programs: where they are, and what they say when they are asked.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{io::AsyncReadExt, process::Command, time::timeout};

/// How long a program may take to tell something of itself.
const DEADLINE: Duration = Duration::from_secs(10);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 4 << 20;

/// The first executable called `name` in `dirs`.
pub(crate) fn find(dirs: &[PathBuf], name: &str) -> Option<PathBuf> {
    dirs.iter().map(|dir| dir.join(name)).find(|file| is_program(file))
}

/// Whether somebody may execute it.
pub(crate) fn is_program(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// What `program` prints.
///
/// # Errors
/// When it fails, with its own words, or takes too long.
pub(crate) async fn ask(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let command = || format!("{} {}", program.display(), arguments.join(" "));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("execute {}", program.display()))?;
    let (mut said, mut complained) = (String::new(), String::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (Some(stdout), Some(stderr)) = (stdout, stderr) else { bail!("{}: no pipes", command()) };
    let (mut stdout, mut stderr) = (stdout.take(MAX_ANSWER), stderr.take(MAX_ANSWER));
    let heard = async {
        tokio::try_join!(stdout.read_to_string(&mut said), stderr.read_to_string(&mut complained))?;
        child.wait().await
    };
    let status = match timeout(DEADLINE, heard).await {
        Ok(status) => status.with_context(command)?,
        Err(_) => bail!("{} did not answer within {} s", command(), DEADLINE.as_secs()),
    };
    if !status.success() {
        let complained = one_line(&complained);
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        match complained.strip_prefix(&format!("{name}: ")) {
            // It speaks for itself.
            Some(sentence) => bail!("{sentence}"),
            None if complained.is_empty() => bail!("{} failed: {status}", command()),
            None => bail!("{} failed: {complained}", command()),
        }
    }
    Ok(said)
}

/// The first line of what `program --version` prints.
pub(crate) async fn version(program: &Path) -> anyhow::Result<String> {
    let said = ask(program, &["--version"]).await?;
    Ok(said.lines().next().unwrap_or_default().trim().to_owned())
}

/// `words` in one line, without what a terminal would obey.
fn one_line(words: &str) -> String {
    let lines: Vec<_> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ").escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_fails_is_quoted() {
        let told = ask(Path::new("/bin/sh"), &["-c", "echo no disk >&2; exit 3"]).await.unwrap_err().to_string();
        assert!(told.ends_with("failed: no disk"), "{told}");
    }

    #[tokio::test]
    async fn a_program_that_fails_in_silence_has_its_status_told() {
        let told = ask(Path::new("/bin/false"), &["x"]).await.unwrap_err().to_string();
        assert_eq!(told, "/bin/false x failed: exit status: 1");
    }

    #[test]
    fn only_what_may_be_executed_is_a_program() {
        assert!(is_program(Path::new("/bin/sh")));
        assert!(!is_program(Path::new("/etc/passwd")));
        assert!(!is_program(Path::new("/bin")));
    }
}
