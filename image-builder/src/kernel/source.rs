//! A kernel compiled from Debian's source package with our own small configuration: everything that a guest needs is
//! built in, so its initrd carries no modules and it can mount a root image by itself. Takes minutes.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::Stdio;

use crate::apt::{self, Package};
use crate::cache::{Cache, Entry};
use crate::digest;
use crate::error::{Error, Result};
use crate::manifest::Section;
use crate::progress::Progress;
use crate::recipe::Kernel;
use crate::tool::{self, Tool};

use super::{BZIMAGE, CONFIG, MODULE_ORDER, VMLINUX, write};

/// Our configuration, for `make allnoconfig`.
const FRAGMENT: &str = include_str!("guest.config");

/// The fragment's name, in messages.
const FRAGMENT_NAME: &str = "image-builder/src/kernel/guest.config";

/// Programs that the build calls; asked for before anything long is started.
const PROGRAMS: &[&str] = &["make", "gcc", "flex", "bison", "bc", "lz4", "strip", "tar", "xz"];

/// The bulk of the source, of which no line is compiled; what configures it stays.
const UNUSED: &[&str] =
    &["*.rst", "*.dts", "*.dtsi", "*/drivers/gpu/*.[ch]", "*/drivers/media/*.[ch]", "*/sound/*.[ch]"];

/// Goes into the kernel's version line instead of the time and place of the build.
const IDENTITY: [(&str, &str); 4] = [
    ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
    ("KBUILD_BUILD_USER", "image-builder"),
    ("KBUILD_BUILD_HOST", "caisson"),
    ("KBUILD_BUILD_VERSION", "1"),
];

/// Builds the kernel, or finds it in the cache.
pub fn build(cache: &Cache, recipe: &Kernel, progress: &Progress) -> Result<Entry> {
    for program in PROGRAMS {
        tool::version(program)?;
    }
    let package = apt::find(recipe.package(), recipe.version.as_deref())?;
    let section = Section::default()
        .input(&package.name, Some(&package.version), &package.sha256)
        .input(FRAGMENT_NAME, None, &digest::of_bytes(FRAGMENT.as_bytes()))
        .option("flavour", "debian-source")
        .tool("gcc", tool::version("gcc")?)
        .tool("strip", tool::version("strip")?);
    cache.entry("kernel", section, |directory, section| {
        let work = cache.temporary()?;
        unpack(cache, &package, work.path(), progress)?;
        let source = work.path().join("source");
        progress.step("configuring the kernel");
        configure(&source, &package)?;
        compile(&source, progress)?;
        let vmlinux = directory.join(VMLINUX);
        Tool::new("strip", "strip the kernel").arg("-o").arg(&vmlinux).arg(source.join(VMLINUX)).run()?;
        copy(&source.join("arch/x86/boot/bzImage"), &directory.join(BZIMAGE))?;
        copy(&source.join(".config"), &directory.join(CONFIG))?;
        write(directory, MODULE_ORDER, b"")?;
        section.note("release", release(&source)?);
        Ok(())
    })
}

fn unpack(cache: &Cache, package: &Package, work: &Path, progress: &Progress) -> Result<()> {
    progress.step(format!("fetching {} {}", package.name, package.version));
    let file = apt::download(cache, package)?;
    progress.step(format!("unpacking {} {}", package.name, package.version));
    let (debian, source) = (work.join("package"), work.join("source"));
    apt::unpack(&file, &debian)?;
    fs::create_dir(&source).map_err(Error::file("create", &source))?;
    let archive = debian.join(format!("usr/src/{}.tar.xz", package.name));
    Tool::new("tar", format!("unpack {}", archive.display()))
        .args(["--extract", "--xz", "--strip-components=1"])
        .args(UNUSED.iter().map(|pattern| format!("--exclude={pattern}")))
        .arg("--file")
        .arg(&archive)
        .arg("--directory")
        .arg(&source)
        .run()?;
    Ok(())
}

/// Turns everything off but the fragment, and makes sure that the fragment was taken.
fn configure(source: &Path, package: &Package) -> Result<()> {
    let fragment = source.join("guest.config");
    fs::write(&fragment, FRAGMENT).map_err(Error::file("write", &fragment))?;
    make("configure the kernel", source).args(["allnoconfig", "KCONFIG_ALLCONFIG=guest.config"]).run()?;
    let config = source.join(".config");
    let config = fs::read_to_string(&config).map_err(Error::file("read", &config))?;
    let dropped = dropped(FRAGMENT, &config);
    if dropped.is_empty() {
        return Ok(());
    }
    Err(Error::ConfigDropped {
        version: package.version.clone(),
        symbols: dropped.join(", "),
        fragment: FRAGMENT_NAME.to_owned(),
    })
}

/// The fragment's lines that the configuration does not have.
fn dropped<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let has: std::collections::HashSet<&str> = config.lines().collect();
    fragment.lines().filter(|line| line.starts_with("CONFIG_") && !has.contains(line)).collect()
}

fn compile(source: &Path, progress: &Progress) -> Result<()> {
    progress.step("compiling the kernel (about 11 minutes of processor time)");
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let purpose = "compile the kernel";
    let log = source.join("build.log");
    let errors = fs::File::create(&log).map_err(Error::file("create", &log))?;
    let mut child = make(purpose, source)
        .args([&format!("-j{jobs}"), VMLINUX, "bzImage"])
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()?;
    if let Some(output) = child.stdout.take() {
        follow(output, progress);
    }
    let status = child.wait().map_err(Error::file("wait for make in", source))?;
    if status.success() {
        return Ok(());
    }
    let words = tool::last_words(&fs::read_to_string(&log).unwrap_or_default());
    Err(Error::Tool { program: "make".into(), purpose: purpose.into(), status: tool::status_words(status), words })
}

/// Shows what make is at, until it closes its output.
fn follow(output: impl Read, progress: &Progress) {
    for (index, line) in BufReader::new(output).lines().map_while(std::io::Result::ok).enumerate() {
        progress.detail(format!("compiling the kernel: step {}: {}", index + 1, line.trim()));
    }
}

fn make(purpose: &str, source: &Path) -> Tool {
    let make = Tool::new("make", purpose).current_dir(source);
    IDENTITY.iter().fold(make, |make, (name, value)| make.env(name, value))
}

fn release(source: &Path) -> Result<String> {
    let path = source.join("include/config/kernel.release");
    Ok(fs::read_to_string(&path).map_err(Error::file("read", &path))?.trim().to_owned())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).map_err(Error::file("write", to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbol_that_was_not_taken_is_found() {
        let fragment = "# comment\nCONFIG_NET=y\nCONFIG_BPF_JIT=y\n";
        assert_eq!(dropped(fragment, "CONFIG_NET=y\n# CONFIG_BPF_JIT is not set\n"), ["CONFIG_BPF_JIT=y"]);
    }

    #[test]
    fn the_fragment_names_every_symbol_once() {
        let mut seen = std::collections::BTreeSet::new();
        let twice: Vec<&str> =
            FRAGMENT.lines().filter(|line| line.starts_with("CONFIG_") && !seen.insert(*line)).collect();
        assert_eq!(twice, [""; 0]);
    }
}
