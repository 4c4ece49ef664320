//! One boot under the kernel's tracer: what the time goes to. Tracing takes time itself, so that the parts are a little
//! larger than those of an untraced boot.

use std::{collections::BTreeMap, path::Path};

use anyhow::Result;

use super::{hypervisor::Candidate, timing::Running};
use crate::bench::tracer::{TRACER, Tracer, split};

const EVENTS: &[&str] = &["kvm/kvm_entry", "kvm/kvm_exit", "raw_syscalls/sys_enter"];
/// The first process has spoken.
const MARK: &str = "first process";
/// `execve` on x86-64.
const EXEC: &str = "NR 59 ";

/// Where the time went, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// From exec to the vCPU's first instruction.
    pub set_up: f64,
    /// In the guest.
    pub guest: f64,
    /// By reason: how many there were, and how long until the guest went on.
    pub exits: BTreeMap<String, Exits>,
    /// System calls of the hypervisor's processes.
    pub system_calls: u64,
}

/// The exits for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Exits {
    /// How many.
    pub count: u64,
    /// In milliseconds.
    pub time: f64,
}

/// Boots the guest once.
pub fn boot(candidate: &Candidate) -> Result<Trace> {
    let tracer = Tracer::start(EVENTS)?;
    let running = Running::start(candidate.command(Some(&Path::new(TRACER).join("set_event_pid")))?)?;
    let booted = running.wait_for_init();
    tracer.mark(MARK)?;
    let text = tracer.stop()?;
    booted?;
    Ok(parse(&text))
}

/// What the vCPU was doing.
enum Vcpu {
    NotYet,
    InGuest,
    Outside(String),
}

fn parse(text: &str) -> Trace {
    let mut trace = Trace::default();
    let (mut vcpu, mut since) = (Vcpu::NotYet, None);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((at, event, details)) = split(line) else { continue };
        let started = *since.get_or_insert(at);
        match (event, &vcpu) {
            ("sys_enter", Vcpu::NotYet) if trace.system_calls == 0 && details.contains(EXEC) => {
                since = Some(at);
                trace.system_calls = 1;
            }
            ("sys_enter", _) => trace.system_calls += u64::from(trace.system_calls > 0),
            ("kvm_entry", before) => {
                match before {
                    Vcpu::NotYet => trace.set_up = at - started,
                    Vcpu::Outside(reason) => trace.exits.entry(reason.clone()).or_default().time += at - started,
                    Vcpu::InGuest => {}
                }
                (vcpu, since) = (Vcpu::InGuest, Some(at));
            }
            ("kvm_exit", _) => {
                trace.guest += at - started;
                let reason = details.split_whitespace().skip_while(|word| *word != "reason").nth(1).unwrap_or("?");
                trace.exits.entry(reason.to_owned()).or_default().count += 1;
                (vcpu, since) = (Vcpu::Outside(reason.to_owned()), Some(at));
            }
            ("tracing_mark_write", _) => break,
            _ => {}
        }
    }
    trace
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# tracer: nop
   sh-70   [000] ..... 1.000000: sys_enter: NR 1 (1, 2, 3)
   sh-70   [000] ..... 1.001000: sys_enter: NR 59 (1, 2, 3)
   vmm-70  [000] ..... 1.002000: sys_enter: NR 2 (1, 2, 3)
   vcpu 0-71 [000] d.... 1.011000: kvm_entry: vcpu 0, rip 0x1
   vcpu 0-71 [000] d.... 1.012000: kvm_exit: vcpu 0 reason io rip 0x2 info1 0x3f8
   vcpu 0-71 [000] ..... 1.013000: sys_enter: NR 16 (1, 2, 3)
   vcpu 0-71 [000] d.... 1.015000: kvm_entry: vcpu 0, rip 0x3
   vcpu 0-71 [000] d.... 1.035000: kvm_exit: vcpu 0 reason npf rip 0x4 info1 0x0
   vcpu 0-71 [000] d.... 1.036000: kvm_entry: vcpu 0, rip 0x4
   xtask-60  [000] ..... 1.037000: tracing_mark_write: first process
   vcpu 0-71 [000] d.... 1.040000: kvm_exit: vcpu 0 reason hlt rip 0x4 info1 0x0
";

    fn rounded(value: f64) -> f64 {
        (value * 1000.0).round() / 1000.0
    }

    #[test]
    fn time_is_counted_for_what_it_was_spent_on() {
        let trace = parse(TEXT);
        assert_eq!((rounded(trace.set_up), rounded(trace.guest), trace.system_calls), (10.0, 21.0, 3));
        let exits: Vec<_> =
            trace.exits.iter().map(|(name, exits)| (name.as_str(), exits.count, rounded(exits.time))).collect();
        assert_eq!(exits, [("io", 1, 3.0), ("npf", 1, 1.0)]);
    }

    #[test]
    fn a_trace_of_nothing_is_empty() {
        assert_eq!(parse("# tracer: nop\n"), Trace::default());
    }
}
