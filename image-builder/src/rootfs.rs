//! The root filesystem image: the agent as `/sbin/init`, alone or in a small Debian system, or a Debian system to test
//! in; as erofs or ext4, with a dm-verity hash tree behind it if wanted.

use std::fs;
use std::path::{Path, PathBuf};

use crate::agent::Agent;
use crate::apt;
use crate::cache::{Cache, Entry};
use crate::error::{Error, Result};
use crate::manifest::Section;
use crate::progress::Progress;
use crate::recipe::{Format, Rootfs, RootfsFlavour};
use crate::tool::{self, Tool};
use crate::tree::{Content, Tree};
use crate::{digest, filesystem, initrd, kernel, verity};

/// Time that mmdebstrap takes for "now", in seconds since 1970.
const SOURCE_DATE_EPOCH: &str = "1";

/// Left out of a Debian system: nobody reads manuals in a guest.
const EXCLUDED: &[&str] = &["/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*"];

/// What a test host is for, and what its tests call.
const TEST_HOST_PACKAGES: &[&str] = &[
    "busybox-static",
    "containerd",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "kmod",
    "libcap-ng0",
    "libseccomp2",
    "procps",
    "qemu-system-x86",
    "runc",
    "strace",
    "util-linux",
];

/// Differs from run to run, or tells of the machine that built it.
const VOLATILE: &[&str] = &[
    "etc/hostname",
    "etc/machine-id",
    "etc/resolv.conf",
    "run/mmdebstrap",
    "var/cache/apt",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/cache/ldconfig/aux-cache",
    "var/lib/apt/lists",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/status-old",
    "var/log/alternatives.log",
    "var/log/apt",
    "var/log/bootstrap.log",
    "var/log/dpkg.log",
];

/// Builds the image, or finds it in the cache.
pub fn build(cache: &Cache, recipe: &Rootfs, kernel: &Entry, agent: &Agent, progress: &Progress) -> Result<Entry> {
    let section = Section::default()
        .option("format", filesystem::name(recipe.format))
        .option("verity", recipe.verity.to_string());
    let section = filesystem::tool(section, recipe.format)?;
    let section = match recipe.flavour {
        RootfsFlavour::Minimal => guest_inputs(section.option("flavour", "minimal"), kernel, agent),
        RootfsFlavour::Debian => {
            let section = guest_inputs(section.option("flavour", "debian"), kernel, agent);
            archive_state(debian_inputs(section, recipe)?, cache, recipe)?
        }
        // A test host is given to nobody, and need not be made anew with every update of the archive.
        RootfsFlavour::TestHost => debian_inputs(section.option("flavour", "test-host"), recipe)?,
    };
    cache.entry("rootfs", section, |directory, section| {
        let work = cache.temporary()?;
        let root = work.path().join("root");
        fs::create_dir(&root).map_err(Error::file("create", &root))?;
        if recipe.flavour != RootfsFlavour::Minimal {
            progress.step(format!("installing Debian {} into a directory", recipe.suite));
            let packages = install_debian(recipe, &root)?;
            section.note("packages", packages);
        }
        if recipe.flavour != RootfsFlavour::TestHost {
            guest_files(kernel, agent)?.write_directory(&root)?;
        }
        progress.step(format!("making the {} image", filesystem::name(recipe.format)));
        let image = directory.join(file_name(recipe.format));
        filesystem::make(recipe.format, &root, &image)?;
        if recipe.verity {
            progress.step("making the dm-verity hash tree");
            section.verity = Some(verity::append(&image)?);
        }
        Ok(())
    })
}

/// `rootfs.erofs` or `rootfs.ext4`.
pub fn file_name(format: Format) -> String {
    format!("rootfs.{}", filesystem::name(format))
}

/// The agent, the modules, and the mount points.
fn guest_files(kernel: &Entry, agent: &Agent) -> Result<Tree> {
    let mut tree = initrd::base();
    initrd::add_modules(&mut tree, kernel)?;
    tree.file("sbin/init", 0o755, Content::Copy(agent.path.clone()));
    tree.symlink("init", "sbin/init");
    Ok(tree)
}

fn guest_inputs(section: Section, kernel: &Entry, agent: &Agent) -> Section {
    kernel::module_inputs(kernel, section.input("agent", None, &agent.sha256))
}

fn debian_inputs(section: Section, recipe: &Rootfs) -> Result<Section> {
    let section = match &recipe.mirror {
        Some(mirror) => section.option("mirror", mirror),
        None => section,
    };
    Ok(section
        .option("suite", &recipe.suite)
        .option("packages", packages(recipe).join(" "))
        .tool("mmdebstrap", tool::version("mmdebstrap")?))
}

/// What is installed on top of `minbase`.
fn packages(recipe: &Rootfs) -> Vec<&str> {
    let own = if recipe.flavour == RootfsFlavour::TestHost { TEST_HOST_PACKAGES } else { &[] };
    let mut packages: Vec<&str> = recipe.packages.iter().map(String::as_str).chain(own.iter().copied()).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// The state of the Debian archive is an input: which versions it holds is what its signed index says.
fn archive_state(section: Section, cache: &Cache, recipe: &Rootfs) -> Result<Section> {
    let work = cache.temporary()?;
    indices(recipe).iter().enumerate().try_fold(section, |section, (number, address)| {
        let file: PathBuf = work.path().join(number.to_string());
        apt::fetch(address, &file)?;
        Ok(section.input(address, None, &digest::of_file(&file)?))
    })
}

/// Addresses of the signed indices that mmdebstrap goes by.
fn indices(recipe: &Rootfs) -> Vec<String> {
    let suite = &recipe.suite;
    match &recipe.mirror {
        Some(mirror) => vec![format!("{}/dists/{suite}/InRelease", mirror.trim_end_matches('/'))],
        None => vec![
            format!("http://deb.debian.org/debian/dists/{suite}/InRelease"),
            format!("http://deb.debian.org/debian/dists/{suite}-updates/InRelease"),
            format!("http://deb.debian.org/debian-security/dists/{suite}-security/InRelease"),
        ],
    }
}

/// Installs into the directory; returns `name=version` of every package.
fn install_debian(recipe: &Rootfs, root: &Path) -> Result<String> {
    let excluded = EXCLUDED.iter().map(|path| format!("--dpkgopt=path-exclude={path}"));
    let included = packages(recipe).into_iter().map(|package| format!("--include={package}"));
    Tool::new("mmdebstrap", format!("install Debian {}", recipe.suite))
        .env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH)
        .args(["--quiet", "--mode=root", "--format=directory", "--variant=minbase"])
        .args(excluded)
        .args(included)
        .arg(&recipe.suite)
        .arg(root)
        .args(&recipe.mirror)
        .run()?;
    let packages = Tool::new("dpkg-query", "list the installed packages")
        .args(["--show", "--showformat", "${Package}=${Version}\n"])
        .arg(format!("--admindir={}", root.join("var/lib/dpkg").display()))
        .run()?;
    for path in VOLATILE {
        remove(&root.join(path))?;
    }
    Ok(packages.lines().collect::<Vec<_>>().join(" "))
}

/// Removes a file or a directory, if it is there.
fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    };
    removed.map_err(Error::file("remove", path))
}
