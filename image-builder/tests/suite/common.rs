//! What the tests share: a stand-in for the agent, and what this machine can do.

use std::path::{Path, PathBuf};
use std::process::Command;

use image_builder::recipe::{Kernel, KernelFlavour, Recipe};

/// Compiles `tests/guest/init.rs` into a static program.
pub fn static_init(directory: &Path) -> PathBuf {
    let program = directory.join("init");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/init.rs");
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition", "2024", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"]);
    let status = rustc.arg(&program).arg(source).status().expect("run rustc");
    assert!(status.success(), "rustc could not compile the guest's init");
    program
}

/// With Debian's compiled kernel, which takes no minutes to build and has modules to load.
pub fn recipe() -> Recipe {
    let kernel = Kernel { flavour: KernelFlavour::DebianBinary, ..Kernel::default() };
    Recipe { kernel, ..Recipe::default() }
}

/// Whether a program is installed; says so when it is not.
pub fn has(program: &str) -> bool {
    let found =
        ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].iter().any(|directory| Path::new(directory).join(program).is_file());
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

/// Whether apt can give us the kernel; says so when it cannot.
pub fn has_kernel_package() -> bool {
    let known = has("apt-cache") && image_builder::apt::find("linux-image-cloud-amd64", None).is_ok();
    if !known {
        eprintln!("skipped: apt knows no linux-image-cloud-amd64 (not Debian, or no package lists)");
    }
    known
}

/// Whether device nodes can be made; says so when they cannot.
pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: root filesystems need root");
    }
    root
}
