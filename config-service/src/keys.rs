//! The keys that every hypervisor, the agent and the runtime have: what each means, takes, and sets.
//!
//! One line of these tables is all there is to a key. Names are Kata Containers' wherever the meaning is the same.

use std::{fmt, num::NonZero, thread};

use caisson_protocol::{
    config::{SandboxConfig, SharedFs, Timeouts},
    vmm::VmConfig,
};

/// One key of a table.
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// What holds when it is not written, as TOML; empty for a file that is not used.
    pub default: &'static str,
    /// What may be written, and where it goes.
    pub takes: Takes,
    /// One sentence for people.
    pub meaning: &'static str,
}

/// What a key takes, and how that becomes part of a `SandboxConfig`.
pub enum Takes {
    /// `true` or `false`.
    Bool(fn(&mut SandboxConfig, bool)),
    /// A whole number within both bounds.
    Integer(i64, i64, fn(&mut SandboxConfig, i64)),
    /// Any text of one line.
    Text(fn(&mut SandboxConfig, String)),
    /// One of a few words.
    Choice(&'static [&'static str], fn(&mut SandboxConfig, String)),
    /// An existing file, or "" for none.
    File(fn(&mut SandboxConfig, String)),
    /// An existing program, or "" for the launcher's own choice.
    Program(fn(&mut SandboxConfig, String)),
    /// An array of texts.
    Texts(fn(&mut SandboxConfig, Vec<String>)),
}

impl fmt::Display for Takes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(_) => f.write_str("true or false"),
            Self::Integer(min, max, _) => write!(f, "a whole number from {min} to {max}"),
            Self::Text(_) => f.write_str("a string"),
            Self::Choice(words, _) => write!(f, "one of \"{}\"", words.join("\", \"")),
            Self::File(_) => f.write_str("the absolute path of a file"),
            Self::Program(_) => f.write_str("the absolute path of a program"),
            Self::Texts(_) => f.write_str("an array of strings"),
        }
    }
}

/// `[hypervisor.<name>]`, whichever it is. Applied in this order.
pub const HYPERVISOR: &[Key] = &[
    Key {
        name: "path",
        default: "\"\"",
        takes: Takes::Program(|config, path| vm(config).hypervisor_path = path),
        meaning: "The hypervisor's program; \"\" leaves it to the launcher.",
    },
    Key {
        name: "kernel",
        default: "\"/usr/share/caisson/vmlinux\"",
        takes: Takes::File(|config, path| vm(config).kernel = path),
        meaning: "The guest's kernel.",
    },
    Key {
        name: "initrd",
        default: "\"\"",
        takes: Takes::File(|config, path| vm(config).initrd = path),
        meaning: "The guest's root file system as an initial ramdisk; excludes image.",
    },
    Key {
        name: "image",
        default: "\"\"",
        takes: Takes::File(|config, path| vm(config).image = path),
        meaning: "The guest's root file system as a disk image; excludes initrd.",
    },
    Key {
        name: "kernel_params",
        default: "\"\"",
        takes: Takes::Text(|config, params| vm(config).kernel_params = params),
        meaning: "Appended to the kernel's command line.",
    },
    Key {
        name: "default_vcpus",
        default: "1",
        takes: Takes::Integer(-1, 1024, |config, count| vm(config).vcpus = vcpus(count)),
        meaning: "vCPUs of a new sandbox; 0 is one, -1 is every CPU of the host.",
    },
    Key {
        name: "default_maxvcpus",
        default: "0",
        takes: Takes::Integer(0, 1024, |config, count| vm(config).max_vcpus = u32_of(count)),
        meaning: "To how many vCPUs a sandbox may grow; 0 is as many as it starts with.",
    },
    Key {
        name: "default_memory",
        default: "256",
        takes: Takes::Integer(32, MAX_MEMORY_MIB, |config, mib| vm(config).memory_mib = u64_of(mib)),
        meaning: "Memory of a new sandbox, in MiB.",
    },
    Key {
        name: "default_maxmemory",
        default: "0",
        takes: Takes::Integer(0, MAX_MEMORY_MIB, |config, mib| vm(config).max_memory_mib = u64_of(mib)),
        meaning: "To how much memory a sandbox may grow, in MiB; 0 is as much as it starts with.",
    },
    Key {
        name: "virtio_fs_daemon",
        default: "\"/usr/libexec/virtiofsd\"",
        takes: Takes::Program(|config, path| shared_fs(config).daemon_path = path),
        meaning: "virtiofsd, which serves the shared directory.",
    },
    Key {
        name: "virtio_fs_cache",
        default: "\"auto\"",
        takes: Takes::Choice(&["auto", "always", "never"], |config, cache| shared_fs(config).cache = cache),
        meaning: "How the guest caches shared files.",
    },
    Key {
        name: "virtio_fs_extra_args",
        default: "[\"--thread-pool-size=1\"]",
        takes: Takes::Texts(|config, arguments| shared_fs(config).extra_args = arguments),
        meaning: "Appended to virtiofsd's arguments.",
    },
    // After the keys that describe it, since "none" drops them.
    Key {
        name: "shared_fs",
        default: "\"virtio-fs\"",
        takes: Takes::Choice(&["virtio-fs", "none"], |config, kind| {
            if kind == "none" {
                config.shared_fs.take();
            }
        }),
        meaning: "How host directories reach the guest.",
    },
];

/// `[agent]`.
pub const AGENT: &[Key] = &[Key {
    name: "debug_console_enabled",
    default: "false",
    takes: Takes::Bool(|config, enabled| config.debug_console = enabled),
    meaning: "Whether a shell in the guest itself may be opened.",
}];

/// `[runtime]`.
pub const RUNTIME: &[Key] = &[
    Key {
        name: "hypervisor",
        default: "\"\"",
        // Its value chooses the table to read, before keys are applied.
        takes: Takes::Text(|_, _| ()),
        meaning: "The hypervisor; needed where there are tables for several, or for none.",
    },
    Key {
        name: "log_level",
        default: "\"info\"",
        takes: Takes::Choice(&["error", "warn", "info", "debug", "trace"], |config, level| config.log_level = level),
        meaning: "How much shim, launcher and agent tell.",
    },
    Key {
        name: "create_timeout_ms",
        default: "10000",
        takes: Takes::Integer(1, MAX_TIMEOUT_MS, |config, ms| timeouts(config).create_ms = u32_of(ms)),
        meaning: "From the launcher's start until the VM is ready to run.",
    },
    Key {
        name: "boot_timeout_ms",
        default: "60000",
        takes: Takes::Integer(1, MAX_TIMEOUT_MS, |config, ms| timeouts(config).boot_ms = u32_of(ms)),
        meaning: "From the guest's first instruction until its agent calls.",
    },
    Key {
        name: "request_timeout_ms",
        default: "30000",
        takes: Takes::Integer(1, MAX_TIMEOUT_MS, |config, ms| timeouts(config).request_ms = u32_of(ms)),
        meaning: "For any one request to the agent.",
    },
    Key {
        name: "shutdown_timeout_ms",
        default: "2000",
        takes: Takes::Integer(0, MAX_TIMEOUT_MS, |config, ms| timeouts(config).shutdown_ms = u32_of(ms)),
        meaning: "How long the guest may take to power off before it is ended by force.",
    },
];

/// 16 TiB.
const MAX_MEMORY_MIB: i64 = 16 << 20;
/// An hour.
const MAX_TIMEOUT_MS: i64 = 3_600_000;

fn vm(config: &mut SandboxConfig) -> &mut VmConfig {
    config.vm.mut_or_insert_default()
}

fn shared_fs(config: &mut SandboxConfig) -> &mut SharedFs {
    config.shared_fs.mut_or_insert_default()
}

fn timeouts(config: &mut SandboxConfig) -> &mut Timeouts {
    config.timeouts.mut_or_insert_default()
}

fn vcpus(count: i64) -> u32 {
    match count {
        0 => 1,
        ..0 => thread::available_parallelism().map_or(1, NonZero::get).try_into().unwrap_or(u32::MAX),
        1.. => u32_of(count),
    }
}

/// Of a number within its bounds, which all fit.
fn u32_of(number: i64) -> u32 {
    u32::try_from(number).unwrap_or_default()
}

/// Of a number within its bounds, which all fit.
fn u64_of(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}
