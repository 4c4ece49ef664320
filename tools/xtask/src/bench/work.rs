//! One pod under the kernel's tracer: what the processors do meanwhile, by program, and a virtual machine's part of it by
//! what it is for. Tracing takes time itself, so that the parts are a little larger than those of an untraced pod.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use caisson_testbed::Containerd;

use super::tracer::{Tracer, split};

const EVENTS: &[&str] = &["sched/sched_switch", "kvm/kvm_entry", "kvm/kvm_exit"];
const BEGIN: &str = "the pod begins";
const END: &str = "the pod ends";
/// The processors' own thread, which runs when no other can.
const IDLE: &str = "nothing";

/// Milliseconds by what they were spent on.
pub type Work = BTreeMap<String, f64>;

/// Runs a pod of `containerd`.
pub fn measure(containerd: &Containerd) -> Result<Work> {
    let tracer = Tracer::start(EVENTS)?;
    tracer.mark(BEGIN)?;
    containerd.run(&[], &["echo"])?.success()?;
    tracer.mark(END)?;
    let text = tracer.stop()?;
    Ok(parse(&text))
}

/// What one processor does.
#[derive(Default)]
struct Processor {
    in_guest: bool,
    since: Option<f64>,
}

/// Time of one thread.
#[derive(Default)]
struct Thread {
    name: String,
    process: u32,
    before_guest: f64,
    guest: f64,
    outside: f64,
    has_guest: bool,
}

/// The time until an event belongs to the thread that the event is of.
fn parse(text: &str) -> Work {
    let mut threads = HashMap::<u32, Thread>::new();
    let mut processors = HashMap::<&str, Processor>::new();
    let (mut begun, mut guest_runs) = (false, false);
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (Some((at, event, details)), Some(Place { name, thread, process, processor })) = (split(line), place(line))
        else {
            continue;
        };
        let processor = processors.entry(processor).or_default();
        let thread = threads.entry(thread).or_default();
        (thread.name, thread.process) = (name.to_owned(), process);
        if let (true, Some(since)) = (begun, processor.since) {
            let account = match (processor.in_guest, guest_runs) {
                (true, _) => &mut thread.guest,
                (false, true) => &mut thread.outside,
                (false, false) => &mut thread.before_guest,
            };
            *account += at - since;
        }
        processor.since = Some(at);
        match event {
            "kvm_entry" => {
                (processor.in_guest, thread.has_guest) = (true, true);
                guest_runs |= begun;
            }
            "tracing_mark_write" => begun = details.contains(BEGIN),
            // An exit, or another thread's turn.
            _ => processor.in_guest = false,
        }
    }
    sum(&threads)
}

/// Who an event is of, and where it was.
struct Place<'a> {
    name: &'a str,
    thread: u32,
    process: u32,
    processor: &'a str,
}

/// `NAME-THREAD (PROCESS) [PROCESSOR] …`; a name may have anything in it.
fn place(line: &str) -> Option<Place<'_>> {
    let (who, rest) = line.split_once(") [")?;
    let (who, process) = who.rsplit_once('(')?;
    let (name, thread) = who.trim().rsplit_once('-')?;
    let thread = thread.trim().parse().ok()?;
    // Unknown processes are dashes.
    let process = process.trim().parse().unwrap_or(thread);
    Some(Place { name, thread, process, processor: rest.split(']').next()? })
}

/// By program. A program with a guest is told in parts.
fn sum(threads: &HashMap<u32, Thread>) -> Work {
    // A process is called as its first thread, as far as that has run.
    let name = |thread: &Thread| threads.get(&thread.process).unwrap_or(thread).name.clone();
    let hypervisors: Vec<u32> =
        threads.values().filter(|thread| thread.has_guest).map(|thread| thread.process).collect();
    let mut work = Work::new();
    for thread in threads.values() {
        let mut add = |name: &str, time: f64| {
            if time > 0.0 {
                *work.entry(name.to_owned()).or_default() += time;
            }
        };
        if thread.process == 0 {
            add(IDLE, thread.before_guest + thread.outside);
        } else if hypervisors.contains(&thread.process) {
            add("VMM: set-up", thread.before_guest);
            add("VMM: the guest itself", thread.guest);
            let part = if thread.has_guest { "VMM: exits" } else { "VMM: other threads" };
            add(part, thread.outside);
        } else {
            add(&name(thread), thread.before_guest + thread.outside);
        }
    }
    work
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# tracer: nop
   xtask-60  (     60) [000] d.... 0.900000: sched_switch: prev_comm=xtask ==> next_comm=xtask
   xtask-60  (     60) [000] ..... 1.000000: tracing_mark_write: the pod begins
   xtask-60  (     60) [000] d.... 1.001000: sched_switch: prev_comm=xtask ==> next_comm=vmm
   vmm-70    (     70) [000] d.... 1.004000: sched_switch: prev_comm=vmm ==> next_comm=vcpu 0
   vcpu 0-71 (     70) [000] d.... 1.006000: kvm_entry: vcpu 0, rip 0x1
   vcpu 0-71 (     70) [000] d.... 1.016000: kvm_exit: vcpu 0 reason hlt rip 0x2
   vcpu 0-71 (     70) [000] d.... 1.017000: sched_switch: prev_comm=vcpu 0 ==> next_comm=swapper/0
   <idle>-0  (-------) [000] d.... 1.037000: sched_switch: prev_comm=swapper/0 ==> next_comm=devices
   devices-72 (     70) [000] d.... 1.040000: sched_switch: prev_comm=devices ==> next_comm=xtask
   xtask-60  (     60) [000] ..... 1.041000: tracing_mark_write: the pod ends
   xtask-60  (     60) [000] d.... 1.091000: sched_switch: prev_comm=xtask ==> next_comm=vmm
";

    #[test]
    fn time_belongs_to_the_program_that_ran() {
        let work = parse(TEXT);
        let work: Vec<_> = work.iter().map(|(name, time)| (name.as_str(), time.round())).collect();
        let expected = [
            ("VMM: exits", 1.0),
            ("VMM: other threads", 3.0),
            ("VMM: set-up", 5.0),
            ("VMM: the guest itself", 10.0),
            ("nothing", 20.0),
            ("xtask", 2.0),
        ];
        assert_eq!(work, expected);
    }
}
