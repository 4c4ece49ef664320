//! Which devices a container may make and open: the rules of its configuration as a BPF program on its cgroup.
//!
//! The last rule that fits decides. After the configuration's own come those that every container has: it may make any
//! node, and open the harmless ones. `linux/bpf.h`, `struct bpf_cgroup_dev_ctx`; the meaning is that of runc.

use std::{fs::File, path::Path};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::{
    error::{Attempt, Result},
    sys,
};

/// Has the kernel ask `rules` about every device that a process of `cgroup` makes or opens.
///
/// # Errors
/// When the kernel has no BPF for cgroups.
pub fn apply(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let what = "restrict devices, which needs a guest kernel with CONFIG_CGROUP_BPF";
    let rules: Vec<Rule> = rules.iter().map(Rule::of).chain(DEFAULTS).collect();
    let program = sys::load_device_program(&program(&rules)).attempt(what)?;
    let cgroup = File::open(cgroup).attempt(format_args!("open cgroup {}", cgroup.display()))?;
    sys::attach_device_program(&cgroup, &program).attempt(what)
}

const MAKE: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MAKE | READ | WRITE;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Block = 1,
    Char = 2,
}

/// `None` fits everything.
#[derive(Clone, Copy, Debug)]
struct Rule {
    allow: bool,
    kind: Option<Kind>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

const fn default(kind: Kind, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

const DEFAULTS: [Rule; 10] = [
    default(Kind::Char, None, None, MAKE),
    default(Kind::Block, None, None, MAKE),
    // null, zero, full, random, urandom
    default(Kind::Char, Some(1), Some(3), ALL),
    default(Kind::Char, Some(1), Some(5), ALL),
    default(Kind::Char, Some(1), Some(7), ALL),
    default(Kind::Char, Some(1), Some(8), ALL),
    default(Kind::Char, Some(1), Some(9), ALL),
    // tty, ptmx, and the terminals
    default(Kind::Char, Some(5), Some(0), ALL),
    default(Kind::Char, Some(5), Some(2), ALL),
    default(Kind::Char, Some(136), None, ALL),
];

impl Rule {
    fn of(rule: &LinuxDeviceCgroup) -> Self {
        let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
        let access = rule.access().as_deref().unwrap_or("").chars().fold(0, |access, letter| {
            access
                | match letter {
                    'm' => MAKE,
                    'r' => READ,
                    'w' => WRITE,
                    _ => 0,
                }
        });
        let kind = match rule.typ() {
            Some(LinuxDeviceType::B) => Some(Kind::Block),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(Kind::Char),
            Some(LinuxDeviceType::A | LinuxDeviceType::P) | None => None,
        };
        Self { allow: rule.allow(), kind, major: number(rule.major()), minor: number(rule.minor()), access }
    }

    fn fits_everything(&self) -> bool {
        matches!(self, Self { kind: None, major: None, minor: None, access: ALL, .. })
    }
}

// Registers: 0 the answer, 1 the question, 2 kind, 3 access, 4 major, 5 minor, 6 scratch.
const LOAD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const SET: u8 = 0xb4;
const COPY: u8 = 0xbc;
const JUMP_UNLESS_EQUAL: u8 = 0x56;
const JUMP_IF_EQUAL: u8 = 0x16;
const EXIT: u8 = 0x95;

fn program(rules: &[Rule]) -> Vec<u64> {
    let mut code = vec![
        instruction(LOAD, 2, 1, 0, 0),
        instruction(COPY, 3, 2, 0, 0),
        instruction(AND, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD, 4, 1, 4, 0),
        instruction(LOAD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev().filter(|rule| rule.access != 0) {
        code.extend(block(rule));
        if rule.fits_everything() {
            // What comes behind would never run, and the kernel refuses such a program.
            return code;
        }
    }
    code.extend([instruction(SET, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    code
}

/// Answers if `rule` fits, and goes on behind itself if not.
fn block(rule: &Rule) -> Vec<u64> {
    // (opcode, register, number): go on behind the block when it says so.
    let mut conditions = Vec::new();
    let mut prelude = Vec::new();
    if rule.access != ALL {
        let (mask, opcode) = if rule.allow {
            // Every kind of access that is asked for has to be allowed.
            (ALL & !rule.access, JUMP_UNLESS_EQUAL)
        } else {
            (rule.access, JUMP_IF_EQUAL)
        };
        prelude = vec![instruction(COPY, 6, 3, 0, 0), instruction(AND, 6, 0, 0, mask)];
        conditions.push((opcode, 6, 0));
    }
    let unequal = |register, number: Option<u32>| number.map(|number| (JUMP_UNLESS_EQUAL, register, number));
    conditions.extend(unequal(2, rule.kind.map(|kind| kind as u32)));
    conditions.extend(unequal(4, rule.major));
    conditions.extend(unequal(5, rule.minor));

    let mut code = prelude;
    let count = conditions.len();
    for (index, (opcode, register, number)) in conditions.into_iter().enumerate() {
        // Over the conditions that are left, and the answer's two.
        let distance = (count - index - 1 + 2) as i16;
        code.push(instruction(opcode, register, 0, distance, number));
    }
    code.extend([instruction(SET, 0, 0, 0, u32::from(rule.allow)), instruction(EXIT, 0, 0, 0, 0)]);
    code
}

/// `struct bpf_insn`, little endian.
fn instruction(opcode: u8, destination: u8, source: u8, offset: i16, number: u32) -> u64 {
    u64::from(opcode)
        | u64::from(source << 4 | destination) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(number) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: (Kind, u32, u32) = (Kind::Block, 254, 0);
    const NULL: (Kind, u32, u32) = (Kind::Char, 1, 3);
    const FUSE: (Kind, u32, u32) = (Kind::Char, 10, 229);

    fn rules(json: serde_json::Value) -> Vec<Rule> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).unwrap();
        rules.iter().map(Rule::of).chain(DEFAULTS).collect()
    }

    /// Runs the program as the kernel would.
    fn allows(rules: &[Rule], (kind, major, minor): (Kind, u32, u32), access: u32) -> bool {
        let question = [access << 16 | kind as u32, major, minor];
        let (mut registers, mut at, code) = ([0u32; 7], 0, program(rules));
        loop {
            let word = code[at];
            let (to, from) = (word as usize >> 8 & 0xf, word as usize >> 12 & 0xf);
            let (offset, number) = ((word >> 16) as u16, (word >> 32) as u32);
            at += 1;
            match word as u8 {
                LOAD => registers[to] = question[usize::from(offset) / 4],
                COPY => registers[to] = registers[from],
                AND => registers[to] &= number,
                SHIFT_RIGHT => registers[to] >>= number,
                SET => registers[to] = number,
                JUMP_UNLESS_EQUAL if registers[to] != number => at += usize::from(offset),
                JUMP_IF_EQUAL if registers[to] == number => at += usize::from(offset),
                JUMP_UNLESS_EQUAL | JUMP_IF_EQUAL => {}
                EXIT => return registers[0] == 1,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn an_ordinary_container_makes_any_node_and_opens_the_harmless_ones() {
        let rules = rules(serde_json::json!([{ "allow": false, "access": "rwm" }]));
        assert!(allows(&rules, NULL, READ | WRITE));
        assert!(allows(&rules, DISK, MAKE));
        assert!(!allows(&rules, DISK, READ));
        assert!(!allows(&rules, FUSE, READ | WRITE));
    }

    #[test]
    fn a_device_that_was_granted_may_be_used_only_as_granted() {
        let rules = rules(serde_json::json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "r" }
        ]));
        assert!(allows(&rules, FUSE, READ));
        assert!(!allows(&rules, FUSE, READ | WRITE));
    }

    #[test]
    fn a_privileged_container_opens_everything_but_what_was_taken_away_later() {
        let rules = rules(serde_json::json!([
            { "allow": true, "access": "rwm" },
            { "allow": false, "type": "b", "access": "w" }
        ]));
        assert!(allows(&rules, FUSE, READ | WRITE));
        assert!(allows(&rules, DISK, READ));
        assert!(!allows(&rules, DISK, READ | WRITE));
    }
}
