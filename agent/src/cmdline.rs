//! What the host asks of the agent on the kernel's command line.
//!
//! | parameter | meaning |
//! |---|---|
//! | `caisson.log=LEVEL` | `error`, `warn`, `info`, `debug` or `trace`; `info` when absent |
//! | `caisson.end=reboot` | end the VM by a reboot, where the hypervisor takes that for the end and has no power switch |
//! | `caisson.console=1` | `Guest.Console` may open a shell |

use std::fs;

use tracing::level_filters::LevelFilter;

/// The parameters in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// What is worth a line on the console.
    pub log: LevelFilter,
    /// How the VM ends.
    pub end: End,
    /// Whether a shell in the guest itself may be opened.
    pub console: bool,
}

/// How the VM ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By its power switch.
    PowerOff,
    /// By a reboot that the hypervisor does not follow.
    Reboot,
}

impl Parameters {
    /// Reads `/proc/cmdline`; what cannot be understood counts as absent.
    pub fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(cmdline: &str) -> Self {
        let value = |key: &str| {
            cmdline.split_ascii_whitespace().filter_map(|word| word.split_once('=')).rfind(|(name, _)| *name == key)
        };
        Self {
            log: value("caisson.log").and_then(|(_, level)| level.parse().ok()).unwrap_or(LevelFilter::INFO),
            end: match value("caisson.end") {
                Some((_, "reboot")) => End::Reboot,
                _ => End::PowerOff,
            },
            console: value("caisson.console").is_some_and(|(_, allowed)| allowed == "1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_command_line_gives_the_defaults() {
        let parameters = Parameters::parse("quiet console=ttyS0\n");
        assert_eq!(parameters, Parameters { log: LevelFilter::INFO, end: End::PowerOff, console: false });
    }

    #[test]
    fn the_last_of_two_values_counts() {
        let parameters = Parameters::parse("caisson.log=trace caisson.end=reboot caisson.console=1 caisson.log=debug");
        assert_eq!(parameters, Parameters { log: LevelFilter::DEBUG, end: End::Reboot, console: true });
    }
}
