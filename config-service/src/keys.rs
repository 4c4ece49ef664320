//! The keys that every hypervisor, the agent and the runtime have: what each means, takes, and sets.
//!
//! One line of these tables is all there is to a key. Names are Kata Containers' wherever the meaning is the same.

use std::{collections::HashMap, fmt, num::NonZero, sync::LazyLock, thread};

use caisson_protocol::{
    config::{BlockRootfs, SandboxConfig, SharedFs, Timeouts},
    vmm::VmConfig,
};
use toml::Value;

/// One key of a table.
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// What holds when it is not written, as TOML; empty for a file that is not used.
    pub default: &'static str,
    /// What may be written, and where it goes.
    pub takes: Takes,
    /// For people, beginning with a sentence of its own.
    pub meaning: &'static str,
}

/// What a key takes, and how that becomes part of a `SandboxConfig`.
pub enum Takes {
    /// `true` or `false`.
    Bool(fn(&mut Draft, bool)),
    /// A whole number of a unit, within both bounds.
    Integer(i64, i64, Option<&'static str>, fn(&mut Draft, i64)),
    /// A number of a unit, within both bounds.
    Number(f64, f64, Option<&'static str>, fn(&mut Draft, f64)),
    /// Any text of one line.
    Text(fn(&mut Draft, String)),
    /// One of a few words.
    Choice(&'static [&'static str], fn(&mut Draft, String)),
    /// An existing file, or "" for none.
    File(fn(&mut Draft, String)),
    /// An existing program, or "" for what is found without being named.
    Program(fn(&mut Draft, String)),
    /// A folder, which need not exist.
    Folder(fn(&mut Draft, String)),
    /// An array of texts.
    Texts(fn(&mut Draft, Vec<String>)),
    /// An array of globs that say what annotations may do.
    Globs,
}

/// A configuration while its keys are applied, in any order.
#[derive(Debug, Default)]
pub struct Draft {
    /// As far as it does not depend on several keys.
    pub config: SandboxConfig,
    shared_fs: String,
    rootfs: String,
    rootfs_writable: String,
}

impl Draft {
    /// The configuration, when every key was applied.
    pub(crate) fn finish(self) -> SandboxConfig {
        let Self { mut config, shared_fs, rootfs, rootfs_writable } = self;
        if shared_fs == "none" {
            config.shared_fs.take();
        }
        if rootfs == "virtio-fs" || (rootfs == "auto" && config.shared_fs.is_some()) {
            config.block_rootfs.take();
        }
        if let Some(block_rootfs) = config.block_rootfs.as_mut()
            && rootfs_writable == "memory"
        {
            block_rootfs.writable_disk_mib = 0;
        }
        config
    }
}

impl fmt::Display for Takes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |unit: &Option<&str>| unit.map_or_else(String::new, |unit| format!(" of {unit}"));
        match self {
            Self::Bool(_) => f.write_str("true or false"),
            Self::Integer(min, max, unit, _) => write!(f, "a whole number{} from {min} to {max}", of(unit)),
            Self::Number(min, max, unit, _) => write!(f, "a number{} from {min} to {max}", of(unit)),
            Self::Text(_) => f.write_str("a string"),
            Self::Choice(words, _) => f.write_str(&one_of(words)),
            Self::File(_) => f.write_str("the absolute path of a file"),
            Self::Program(_) => f.write_str("the absolute path of a program"),
            Self::Folder(_) => f.write_str("the absolute path of a folder"),
            Self::Texts(_) => f.write_str("an array of strings"),
            Self::Globs => f.write_str("an array of globs"),
        }
    }
}

impl Key {
    /// Whether it names a file of the host.
    pub(crate) fn is_path(&self) -> bool {
        matches!(self.takes, Takes::File(_) | Takes::Program(_))
    }

    /// The default as a value; a test reads them all.
    pub(crate) fn default(&self) -> Value {
        DEFAULTS.get(self.default).cloned().unwrap_or_else(|| "".into())
    }
}

/// Every default by its text: reading TOML takes longer than all else that is done about a key.
static DEFAULTS: LazyLock<HashMap<&str, Value>> = LazyLock::new(|| {
    let texts = HYPERVISOR.iter().chain(AGENT).chain(RUNTIME).map(|key| key.default);
    let read = |text| toml::from_str::<toml::Table>(&format!("value = {text}")).ok()?.remove("value");
    texts.filter_map(|text| Some((text, read(text)?))).collect()
});

/// The key that lists where the paths may lie that annotations give the path-valued `key`.
pub(crate) fn valid_paths(key: &str) -> String {
    match key {
        // Kata Containers' name for it.
        "path" => "valid_hypervisor_paths".to_owned(),
        key => format!("valid_{}_paths", key.strip_suffix("_path").unwrap_or(key)),
    }
}

/// The key that lists what annotations may set.
pub(crate) const ENABLE_ANNOTATIONS: &str = "enable_annotations";

/// `one of "a", "b"`
pub(crate) fn one_of(words: &[&str]) -> String {
    format!("one of \"{}\"", words.join("\", \""))
}

/// `[hypervisor.<name>]`, whichever it is.
pub const HYPERVISOR: &[Key] = &[
    Key {
        name: "path",
        default: "\"\"",
        takes: Takes::Program(|draft, path| vm(draft).hypervisor_path = path),
        meaning: "The hypervisor's program; \"\" leaves it to the launcher.",
    },
    Key {
        name: "kernel",
        default: "\"/usr/share/caisson/vmlinux\"",
        takes: Takes::File(|draft, path| vm(draft).kernel = path),
        meaning: "The guest's kernel.",
    },
    Key {
        name: "initrd",
        default: "\"\"",
        takes: Takes::File(|draft, path| vm(draft).initrd = path),
        meaning: "The guest's root file system as an initial ramdisk; excludes image.",
    },
    Key {
        name: "image",
        default: "\"\"",
        takes: Takes::File(|draft, path| vm(draft).image = path),
        meaning: "The guest's root file system as a disk image; excludes initrd.",
    },
    Key {
        name: "kernel_params",
        default: "\"\"",
        takes: Takes::Text(|draft, params| vm(draft).kernel_params = params),
        meaning: "Appended to the kernel's command line. What an annotation gives is appended to that.",
    },
    Key {
        name: "default_vcpus",
        default: "1",
        takes: Takes::Number(-1.0, 1024.0, None, |draft, count| vm(draft).vcpus = vcpus(count)),
        meaning: "vCPUs of a new sandbox, rounded up; 0 is one, -1 is every CPU of the host. A sandbox whose CPU limit \
                  is higher gets as many as that allows.",
    },
    Key {
        name: "default_maxvcpus",
        default: "0",
        takes: Takes::Integer(0, 1024, None, |draft, count| vm(draft).max_vcpus = u32_of(count)),
        meaning: "To how many vCPUs a sandbox may grow; 0 is as many as it starts with.",
    },
    Key {
        name: "default_memory",
        default: "256",
        takes: Takes::Integer(32, MAX_MEMORY_MIB, MIB, |draft, mib| vm(draft).memory_mib = u64_of(mib)),
        meaning: "Memory of a new sandbox; its containers' memory limit is added.",
    },
    Key {
        name: "default_maxmemory",
        default: "0",
        takes: Takes::Integer(0, MAX_MEMORY_MIB, MIB, |draft, mib| vm(draft).max_memory_mib = u64_of(mib)),
        meaning: "To how much memory a sandbox may grow; 0 is as much as it starts with.",
    },
    Key {
        name: "enable_hugepages",
        default: "false",
        takes: Takes::Bool(|draft, enabled| vm(draft).huge_pages = enabled),
        meaning: "Whether the guest's memory is made of the host's huge pages, which have to be reserved \
                  (vm.nr_hugepages) and are taken when the sandbox starts.",
    },
    Key {
        name: "confidential_guest",
        default: "false",
        takes: Takes::Bool(|draft, enabled| vm(draft).confidential_guest = enabled),
        meaning: "Whether the host is kept from reading the guest's memory, by Intel TDX or AMD SEV-SNP; refused where \
                  the processor or the hypervisor's launcher has neither.",
    },
    Key {
        name: "cold_plug_vfio",
        default: "\"no-port\"",
        takes: Takes::Choice(&["no-port", "root-port", "switch-port"], |_, _| ()),
        meaning: "On which port the guest finds devices of the host that it has from the start; no-port gives it none. \
                  The others are refused where the hypervisor's launcher passes no device through.",
    },
    Key {
        name: "shared_fs",
        default: "\"virtio-fs\"",
        takes: Takes::Choice(&["virtio-fs", "none"], |draft, way| draft.shared_fs = way),
        meaning: "How host directories reach the guest.",
    },
    Key {
        name: "virtio_fs_daemon",
        default: "\"\"",
        takes: Takes::Program(|draft, path| shared_fs(draft).daemon_path = path),
        meaning: "virtiofsd, which serves the shared directory; \"\" is the one that is found beside caisson's programs, on \
                  the PATH, in /usr/libexec or in /usr/lib.",
    },
    Key {
        name: "virtio_fs_cache",
        default: "\"auto\"",
        takes: Takes::Choice(&["auto", "always", "never"], |draft, cache| shared_fs(draft).cache = cache),
        meaning: "How the guest caches shared files.",
    },
    Key {
        name: "virtio_fs_extra_args",
        default: "[\"--thread-pool-size=1\"]",
        takes: Takes::Texts(|draft, arguments| shared_fs(draft).extra_args = arguments),
        meaning: "Appended to virtiofsd's arguments.",
    },
    Key {
        name: "rootfs",
        default: "\"auto\"",
        takes: Takes::Choice(&["auto", "virtio-fs", "block"], |draft, way| draft.rootfs = way),
        meaning: "How a container's root file system reaches the guest: shared like other directories, or as disks \
                  made of its image's layers. auto shares it where shared_fs does.",
    },
    Key {
        name: "rootfs_writable",
        default: "\"memory\"",
        takes: Takes::Choice(&["memory", "disk"], |draft, place| draft.rootfs_writable = place),
        meaning: "Where a container's changes to its root file system go: the guest's memory, or a disk of their own.",
    },
    Key {
        name: "rootfs_disk_size",
        default: "10240",
        takes: Takes::Integer(64, MAX_MEMORY_MIB, MIB, |draft, mib| {
            block_rootfs(draft).writable_disk_mib = u64_of(mib);
        }),
        meaning: "Size of the disk that a container writes to; it takes room as it is filled.",
    },
    Key {
        name: "rootfs_max_disks",
        default: "5",
        takes: Takes::Integer(2, 24, None, |draft, count| block_rootfs(draft).max_disks = u32_of(count)),
        meaning: "How many disks a container's root file system may take; the lower layers of an image that has more \
                  are joined in one.",
    },
    Key {
        name: "layer_cache_path",
        default: "\"/var/lib/caisson/layers\"",
        takes: Takes::Folder(|draft, path| block_rootfs(draft).layer_cache_path = path),
        meaning: "Where the disks are kept that are made of image layers.",
    },
    Key {
        name: "layer_cache_size",
        default: "20480",
        takes: Takes::Integer(0, MAX_MEMORY_MIB, MIB, |draft, mib| block_rootfs(draft).layer_cache_mib = u64_of(mib)),
        meaning: "When there is more in layer_cache_path, what was not used for longest goes.",
    },
    Key {
        name: ENABLE_ANNOTATIONS,
        default: "[]",
        takes: Takes::Globs,
        meaning: "What a pod may set by annotation io.caisson.config.hypervisor.<key>, or Kata Containers' \
                  io.katacontainers.config.hypervisor.<key>: names of keys of this table, and agent.<key> or \
                  runtime.<key> for the others; * stands for anything but a dot.",
    },
    Key {
        name: "valid_hypervisor_paths",
        default: "[]",
        takes: Takes::Globs,
        meaning: "What an annotation may give path; * stands for anything within one folder's name.",
    },
    Key {
        name: "valid_kernel_paths",
        default: "[]",
        takes: Takes::Globs,
        meaning: "What an annotation may give kernel.",
    },
    Key {
        name: "valid_initrd_paths",
        default: "[]",
        takes: Takes::Globs,
        meaning: "What an annotation may give initrd.",
    },
    Key {
        name: "valid_image_paths",
        default: "[]",
        takes: Takes::Globs,
        meaning: "What an annotation may give image.",
    },
    Key {
        name: "valid_virtio_fs_daemon_paths",
        default: "[]",
        takes: Takes::Globs,
        meaning: "What an annotation may give virtio_fs_daemon.",
    },
];

/// `[agent]`.
pub const AGENT: &[Key] = &[Key {
    name: "debug_console_enabled",
    default: "false",
    takes: Takes::Bool(|draft, enabled| draft.config.debug_console = enabled),
    meaning: "Whether a shell in the guest itself may be opened.",
}];

/// `[runtime]`.
pub const RUNTIME: &[Key] = &[
    Key {
        name: "hypervisor",
        default: "\"\"",
        // Its value chooses the table to read, before keys are applied.
        takes: Takes::Text(|_, _| ()),
        meaning: "The hypervisor; needed where the file has tables for several, or for none.",
    },
    Key {
        name: "log_level",
        default: "\"info\"",
        takes: Takes::Choice(&["error", "warn", "info", "debug", "trace"], |draft, level| {
            draft.config.log_level = level
        }),
        meaning: "How much shim, launcher and agent tell.",
    },
    Key {
        name: "create_timeout_ms",
        default: "10000",
        takes: Takes::Integer(1, MAX_TIMEOUT_MS, MS, |draft, ms| timeouts(draft).create_ms = u32_of(ms)),
        meaning: "From the launcher's start until the VM is ready to run.",
    },
    Key {
        name: "boot_timeout_ms",
        default: "60000",
        takes: Takes::Integer(1, MAX_TIMEOUT_MS, MS, |draft, ms| timeouts(draft).boot_ms = u32_of(ms)),
        meaning: "From the guest's first instruction until its agent calls.",
    },
    Key {
        name: "request_timeout_ms",
        default: "30000",
        takes: Takes::Integer(1, MAX_TIMEOUT_MS, MS, |draft, ms| timeouts(draft).request_ms = u32_of(ms)),
        meaning: "For any one request to the agent.",
    },
    Key {
        name: "shutdown_timeout_ms",
        default: "2000",
        takes: Takes::Integer(0, MAX_TIMEOUT_MS, MS, |draft, ms| timeouts(draft).shutdown_ms = u32_of(ms)),
        meaning: "How long the guest may take to power off before it is ended by force.",
    },
];

/// A unit.
const MIB: Option<&str> = Some("MiB");
/// A unit.
const MS: Option<&str> = Some("ms");
/// 16 TiB.
const MAX_MEMORY_MIB: i64 = 16 << 20;
/// An hour.
const MAX_TIMEOUT_MS: i64 = 3_600_000;

fn vm(draft: &mut Draft) -> &mut VmConfig {
    draft.config.vm.mut_or_insert_default()
}

fn shared_fs(draft: &mut Draft) -> &mut SharedFs {
    draft.config.shared_fs.mut_or_insert_default()
}

fn block_rootfs(draft: &mut Draft) -> &mut BlockRootfs {
    draft.config.block_rootfs.mut_or_insert_default()
}

fn timeouts(draft: &mut Draft) -> &mut Timeouts {
    draft.config.timeouts.mut_or_insert_default()
}

/// How many CPUs this process may run on.
pub(crate) fn host_cpus() -> u32 {
    thread::available_parallelism().map_or(1, NonZero::get).try_into().unwrap_or(u32::MAX)
}

fn vcpus(count: f64) -> u32 {
    if count < 0.0 { host_cpus() } else { (count.ceil() as u32).max(1) }
}

/// Of a number within its bounds, which all fit.
fn u32_of(number: i64) -> u32 {
    u32::try_from(number).unwrap_or_default()
}

/// Of a number within its bounds, which all fit.
fn u64_of(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}
