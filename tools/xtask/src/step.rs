//! Tells the user what is being done and how long it took, on standard error.

use std::{
    io::stderr,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

/// Quicker than this needs no time in the output.
const WORTH_TELLING: Duration = Duration::from_millis(500);

/// Does `work` under the heading `what`.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {what}");
    let started = Instant::now();
    let done = work().with_context(|| what.to_owned())?;
    if started.elapsed() > WORTH_TELLING {
        eprintln!("    done in {}", human(started.elapsed()));
    }
    Ok(done)
}

/// Runs `command` with its output going to the user, who thereby sees it progress. Standard output is left to results.
pub fn run(command: &mut Command) -> Result<()> {
    execute(command.stdout(stderr()))
}

/// Runs `command`, whose standard output nobody needs.
pub fn run_quietly(command: &mut Command) -> Result<()> {
    execute(command.stdout(Stdio::null()))
}

/// `1 min 23 s`, `2.34 s`
pub fn human(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds >= 60 {
        format!("{} min {} s", seconds / 60, seconds % 60)
    } else {
        format!("{:.2} s", duration.as_secs_f64())
    }
}

fn execute(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("execute {}", command.get_program().display()))?;
    ensure!(status.success(), "`{}` ended with {status}", line(command));
    Ok(())
}

fn line(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_named_with_its_arguments() {
        let error = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert_eq!(error, "`sh -c exit 3` ended with exit status: 3");
    }

    #[test]
    fn durations_are_given_in_the_unit_that_suits() {
        assert_eq!(human(Duration::from_millis(2340)), "2.34 s");
        assert_eq!(human(Duration::from_secs(83)), "1 min 23 s");
    }
}
